#include "worker/agent/metrics.h"

#include <prometheus/counter.h>
#include <prometheus/exposer.h>
#include <prometheus/gauge.h>
#include <prometheus/registry.h>

#include <atomic>
#include <chrono>
#include <exception>
#include <vector>

namespace refinery::agent {
namespace {

int64_t NowMs() {
  return std::chrono::duration_cast<std::chrono::milliseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

// A gauge whose value is the time since the last heartbeat at the moment it is asked for.
class HeartbeatAge final : public prometheus::Collectable {
 public:
  void Beat() { last_ms_ = NowMs(); }

  std::vector<prometheus::MetricFamily> Collect() const override {
    prometheus::MetricFamily family;
    family.name = "refinery_worker_heartbeat_age_seconds";
    family.help = "Seconds since the coordinator last answered";
    family.type = prometheus::MetricType::Gauge;
    prometheus::ClientMetric metric;
    metric.gauge.value = static_cast<double>(NowMs() - last_ms_) * 1e-3;
    family.metric.push_back(metric);
    return {family};
  }

 private:
  std::atomic<int64_t> last_ms_{NowMs()};
};

prometheus::Family<prometheus::Counter>& CounterFamily(prometheus::Registry& registry, const char* name,
                                                       const char* help) {
  return prometheus::BuildCounter().Name(name).Help(help).Register(registry);
}

}  // namespace

struct WorkerMetrics::Impl {
  std::shared_ptr<prometheus::Registry> registry = std::make_shared<prometheus::Registry>();
  std::shared_ptr<HeartbeatAge> heartbeat = std::make_shared<HeartbeatAge>();
  prometheus::Family<prometheus::Counter>& attempts =
      CounterFamily(*registry, "refinery_worker_attempts_total", "Attempts that ended, by task kind and outcome");
  prometheus::Family<prometheus::Counter>& seconds =
      CounterFamily(*registry, "refinery_worker_task_seconds_total", "Seconds spent in attempts, by task kind");
  prometheus::Counter& trained =
      CounterFamily(*registry, "refinery_worker_tokens_trained_total", "Tokens trained on").Add({});
  prometheus::Counter& generated =
      CounterFamily(*registry, "refinery_worker_tokens_generated_total", "Tokens generated").Add({});
  prometheus::Counter& sent =
      CounterFamily(*registry, "refinery_worker_sent_bytes_total", "Artifact bytes uploaded").Add({});
  prometheus::Counter& received =
      CounterFamily(*registry, "refinery_worker_received_bytes_total", "Artifact bytes downloaded").Add({});
  prometheus::Gauge& running = prometheus::BuildGauge()
                                   .Name("refinery_worker_running")
                                   .Help("Attempts that run now")
                                   .Register(*registry)
                                   .Add({});
  prometheus::Family<prometheus::Gauge>& loss = prometheus::BuildGauge()
                                                    .Name("refinery_worker_loss")
                                                    .Help("Last loss that a task reported, nats")
                                                    .Register(*registry);
  std::unique_ptr<prometheus::Exposer> exposer;
};

WorkerMetrics::WorkerMetrics(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
WorkerMetrics::~WorkerMetrics() = default;

StatusOr<std::unique_ptr<WorkerMetrics>> WorkerMetrics::Serve(const std::string& address) {
  auto impl = std::make_unique<Impl>();
  if (address != "none") {
    try {
      impl->exposer = std::make_unique<prometheus::Exposer>(address, 2);
    } catch (const std::exception& error) {   // civetweb says only that it could not start
      return Unavailable("cannot serve metrics at ", address, " (", error.what(),
                         "): is the port in use? Give another --metrics-address, port 0 for any, or none");
    }
    impl->exposer->RegisterCollectable(impl->registry);
    impl->exposer->RegisterCollectable(impl->heartbeat);
  }
  return std::unique_ptr<WorkerMetrics>(new WorkerMetrics(std::move(impl)));
}

void WorkerMetrics::AttemptStarted() { impl_->running.Increment(); }

void WorkerMetrics::AttemptEnded(const std::string& kind, const std::string& outcome, double seconds) {
  impl_->running.Decrement();
  impl_->attempts.Add({{"kind", kind}, {"outcome", outcome}}).Increment();
  impl_->seconds.Add({{"kind", kind}}).Increment(seconds);
}

void WorkerMetrics::AddTokens(uint64_t trained, uint64_t generated) {
  impl_->trained.Increment(static_cast<double>(trained));
  impl_->generated.Increment(static_cast<double>(generated));
}

void WorkerMetrics::SetLoss(const std::string& kind, double loss) { impl_->loss.Add({{"kind", kind}}).Set(loss); }

void WorkerMetrics::AddBytes(uint64_t sent, uint64_t received) {
  impl_->sent.Increment(static_cast<double>(sent));
  impl_->received.Increment(static_cast<double>(received));
}

void WorkerMetrics::Heartbeat() { impl_->heartbeat->Beat(); }

int WorkerMetrics::port() const {
  return impl_->exposer ? impl_->exposer->GetListeningPorts().front() : 0;
}

}  // namespace refinery::agent

// refinery doctor: looks at everything that can stand between this machine and a working coordinator, one line each, with the fix.

#include <chrono>
#include <cstdlib>
#include <iostream>

#include "client/commands/commands.h"
#include "client/exit_code.h"
#include "common/error_details.h"
#include "common/grpc_status.h"
#include "common/limits.h"
#include "common/tls.h"
#include "refinery/v1/admin_service.grpc.pb.h"

namespace refinery::client {
namespace {

using std::chrono::milliseconds;

constexpr milliseconds kConnectWait{3'000};
constexpr int64_t kMaxSkewMs = 5'000;
constexpr int kExpiryWarningDays = 14;

enum class Grade { kOk, kWarning, kFailed };

class Doctor {
 public:
  void Say(Grade grade, const std::string& what, const std::string& finding) {
    const char* words[] = {"ok  ", "warn", "FAIL"};
    std::cout << words[static_cast<int>(grade)] << "  " << what << std::string(what.size() < 12 ? 12 - what.size() : 1, ' ') << finding
              << "\n";
    failed_ = failed_ || grade == Grade::kFailed;
  }
  void Say(const std::string& what, const Status& status, const std::string& good) {
    Say(status.ok() ? Grade::kOk : Grade::kFailed, what, status.ok() ? good : Message(status));
  }
  bool failed() const { return failed_; }

 private:
  bool failed_ = false;
};

void CheckCertificates(const Globals& globals, Doctor& doctor) {
  const TlsFiles& tls = globals.security.tls;
  if (!tls.any()) {
    const bool loopback = IsLoopback(globals.coordinator);
    doctor.Say(loopback ? Grade::kOk : Grade::kWarning, "encryption",
               loopback ? "none, and none is needed on loopback"
                        : "none: what you send can be read on the way; give refineryd --tls-certificate and this program "
                          "--tls-authority");
    return;
  }
  if (const Status status = CheckTlsFiles(tls); !status.ok()) return doctor.Say(Grade::kFailed, "encryption", Message(status));
  for (const std::filesystem::path& file : {tls.authority, tls.certificate}) {
    if (file.empty()) continue;
    const StatusOr<std::chrono::hours> left = TimeToExpiry(file);
    const int64_t days = left.ok() ? left->count() / 24 : 0;
    if (left.ok() && left->count() < 0) {
      doctor.Say(Grade::kFailed, "certificate", Join(file.string(), " has expired; renew it now"));
      continue;
    }
    doctor.Say(days < kExpiryWarningDays ? Grade::kWarning : Grade::kOk, "certificate",
               Join(file.string(), " is valid for ", days, " more days", days < kExpiryWarningDays ? "; renew it now" : ""));
  }
}

// The caller, version and clock of the coordinator.
Status CheckVersion(v1::JobService::Stub& jobs, Doctor& doctor) {
  grpc::ClientContext context;
  SetDeadline(&context);
  v1::VersionInfo theirs;
  const auto clock_ms = [] {
    return std::chrono::duration_cast<milliseconds>(std::chrono::system_clock::now().time_since_epoch()).count();
  };
  const int64_t sent_ms = clock_ms();
  const Status status = FromGrpc(jobs.GetVersion(&context, v1::GetVersionRequest(), &theirs));
  const int64_t received_ms = clock_ms();
  if (!status.ok()) {
    doctor.Say(Grade::kFailed, absl::IsUnauthenticated(status) || absl::IsPermissionDenied(status) ? "token" : "service",
               Join(Message(status), " (", ReasonOf(status), ")"));
    return status;
  }
  doctor.Say(Grade::kOk, "service", Join("answers within ", received_ms - sent_ms, " ms"));
  doctor.Say(Grade::kOk, "token", Join("you are ", theirs.caller(), ", a ", theirs.role(),
                                       theirs.tenant().empty() ? " for all tenants" : Join(" of tenant ", theirs.tenant())));
  const bool same = theirs.version() == REFINERY_VERSION && theirs.protocol() == limits::kProtocolVersion;
  doctor.Say(same ? Grade::kOk : theirs.protocol() == limits::kProtocolVersion ? Grade::kWarning : Grade::kFailed, "version",
             Join("refineryd ", theirs.version(), " (protocol ", theirs.protocol(), "), this program " REFINERY_VERSION
                  " (protocol ", limits::kProtocolVersion, ")", same ? "" : "; install the same version on both sides"));
  const int64_t skew = theirs.time_ms() - (sent_ms + received_ms) / 2;
  doctor.Say(std::abs(skew) > kMaxSkewMs ? Grade::kWarning : Grade::kOk, "clocks",
             Join("differ by ", std::abs(skew), " ms", std::abs(skew) > kMaxSkewMs
                  ? "; run NTP on both machines (certificates and the times in reports depend on it)" : ""));
  return status;
}

void CheckWorkers(v1::JobService::Stub& jobs, Doctor& doctor) {
  grpc::ClientContext context;
  SetDeadline(&context);
  v1::ListWorkersResponse workers;
  const Status status = FromGrpc(jobs.ListWorkers(&context, v1::ListWorkersRequest(), &workers));
  if (!status.ok()) return doctor.Say(Grade::kWarning, "workers", Message(status));
  size_t live = 0, draining = 0;
  std::string odd;
  for (const v1::WorkerInfo& worker : workers.workers()) {
    if (worker.state() == "lost") continue;
    ++live;
    draining += worker.state() == "draining";
    if (worker.version() != REFINERY_VERSION && !worker.version().empty()) odd = Join(worker.id(), " has ", worker.version());
  }
  if (live == 0) {
    return doctor.Say(Grade::kFailed, "workers", "none is there, so nothing runs; start refinery-worker with this address");
  }
  doctor.Say(odd.empty() ? Grade::kOk : Grade::kWarning, "workers",
             Join(live, " live, ", draining, " of them draining", odd.empty() ? "" : Join("; ", odd, ": install one version")));
}

void CheckCoordinator(const std::shared_ptr<grpc::Channel>& channel, Doctor& doctor) {
  grpc::ClientContext context;
  SetDeadline(&context);
  v1::CoordinatorInfo info;
  const Status status =
      FromGrpc(v1::AdminService::NewStub(channel)->GetCoordinator(&context, v1::GetCoordinatorRequest(), &info));
  if (!status.ok()) return doctor.Say(Grade::kWarning, "coordinator", Message(status));
  doctor.Say(info.state() == "serving" ? Grade::kOk : Grade::kWarning, "coordinator",
             Join(info.state(), ", ", info.jobs_running(), " jobs, ", info.tasks_leased(), " tasks run, ", info.tasks_ready(),
                  " wait", info.state() == "draining" ? "; `refinery admin drain --off` grants leases again" : ""));
  if (info.disk_bytes() > 0) {
    const double used = 1 - static_cast<double>(info.disk_free_bytes()) / static_cast<double>(info.disk_bytes());
    const Grade grade = info.disk_state() == "read_only" ? Grade::kFailed : info.disk_state() == "full" ? Grade::kWarning : Grade::kOk;
    doctor.Say(grade, "disk", Join(static_cast<int>(100 * used), " % used, ", info.disk_free_bytes() >> 30, " GiB free",
                                   grade == Grade::kOk        ? ""
                                   : grade == Grade::kWarning ? ": no new work is admitted; free space or grow the disk"
                                                              : ": nothing is written; free space or grow the disk"));
  }
}

StatusOr<int> Run(const Globals& globals) {
  Doctor doctor;
  CheckCertificates(globals, doctor);
  const StatusOr<std::shared_ptr<grpc::Channel>> channel = MakeChannel(globals.coordinator, globals.security);
  if (!channel.ok()) {
    doctor.Say(Grade::kFailed, "credentials", Message(channel.status()));
    return kWrongInput;
  }
  const auto start = std::chrono::steady_clock::now();
  const Status connected = WaitForConnection(**channel, globals.coordinator, kConnectWait);
  const auto took = std::chrono::duration_cast<milliseconds>(std::chrono::steady_clock::now() - start).count();
  doctor.Say("address", connected, Join(globals.coordinator, " reached within ", took, " ms"));
  if (!connected.ok()) {
    if (globals.security.tls.any()) {
      doctor.Say(Grade::kFailed, "handshake", "if refineryd runs there: does it use TLS, did --tls-authority sign its certificate, and "
                 "does that name this host (else --server-name)? Does it ask for ours (--tls-certificate, --tls-key)?");
    }
    return kWrongInput;
  }
  const auto jobs = v1::JobService::NewStub(*channel);
  if (CheckVersion(*jobs, doctor).ok()) {
    CheckWorkers(*jobs, doctor);
    CheckCoordinator(*channel, doctor);
  }
  return doctor.failed() ? kWrongInput : kOk;
}

}  // namespace

void AddDoctor(CLI::App& app, Globals& globals, Result& result) {
  app.add_subcommand("doctor", "Check the way to the coordinator and its health; says what to do")->callback([&globals, &result] {
    result = Run(globals);
  });
}

}  // namespace refinery::client

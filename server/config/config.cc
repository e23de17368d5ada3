#include "server/config/config.h"

#include <grpcpp/grpcpp.h>

#include <CLI/CLI.hpp>

#include "common/config_file.h"
#include "common/limits.h"
#include "common/logging.h"
#include "common/principals.h"

namespace refinery::config {
namespace {

constexpr char kDescription[] = "refineryd: the coordinator of Refinery";
constexpr char kFooter[] =
    "Every flag has a variable (REFINERYD_LISTEN for --listen) and a key in the file of --config (listen). A flag beats the\n"
    "variable, the variable the file, the file the default. --print-default-config writes such a file.";

// CLI11 writes into the fields of `config`, whose present values are the defaults it shows.
class Flags {
 public:
  Flags(CLI::App& app, v1::CoordinatorConfig* config) : app_(app), config_(config) {}

  CLI::Option* Text(const std::string& name, std::string* field, const std::string& help) {
    return Named(app_.add_option("--" + name, *field, help)->capture_default_str(), name);
  }
  CLI::Option* Number(const std::string& name, int64_t value, const std::string& help, std::function<void(int64_t)> set) {
    CLI::Option* option = app_.add_option_function<int64_t>("--" + name, std::move(set), help);
    option->default_str(std::to_string(value));
    return Named(option, name);
  }
  CLI::Option* Decimal(const std::string& name, double value, const std::string& help, std::function<void(double)> set) {
    CLI::Option* option = app_.add_option_function<double>("--" + name, std::move(set), help);
    option->default_str(Join(value));
    return Named(option, name);
  }

  void AddAll() {
    v1::CoordinatorConfig& c = *config_;
    app_.add_option("--config", file_, "YAML file with these settings")->envname("REFINERYD_CONFIG");
    Text("state", c.mutable_state(), "Folder of the event log and the artifacts; one coordinator each");
    Text("listen", c.mutable_listen(), "HOST:PORT to serve on; port 0 takes any, written to <state>/address");
    Named(app_.add_flag_function("--insecure-listen-anywhere,--insecure-listen",
                                 [&c](int64_t count) { c.set_insecure_listen_anywhere(count > 0); },
                                 "Allow --listen on an address that other machines reach, without encryption"),
          "insecure-listen-anywhere");
    Text("tls-certificate", c.mutable_tls()->mutable_certificate(), "PEM file: encrypt, and show this certificate");
    Text("tls-key", c.mutable_tls()->mutable_key(), "PEM file: its key");
    Text("tls-authority", c.mutable_tls()->mutable_authority(), "PEM file: let in only clients with a certificate of this authority");
    Text("principals", c.mutable_principals(), "File of `refinery admin token`: who may call; none: everyone who reaches the port");
    Number("rate-per-second", c.rate_per_second(), "Calls of one principal; 0 = no limit",
           [&c](int64_t value) { c.set_rate_per_second(static_cast<uint32_t>(value)); })->check(CLI::Range(0, 1'000'000));
    Number("concurrent-calls", c.concurrent_calls(), "Calls of one principal at the same time; 0 = no limit",
           [&c](int64_t value) { c.set_concurrent_calls(static_cast<uint32_t>(value)); })->check(CLI::Range(0, 1'000'000));
    Text("audit-log", c.mutable_audit_log(), "File of who changed what, or none (default <state>/audit.jsonl)");
    Text("metrics-address", c.mutable_metrics_address(), "HOST:PORT of the /metrics page, or none");
    Number("lease-ttl-ms", c.lease_ttl_ms(), "How long a silent worker keeps its tasks",
           [&c](int64_t value) { c.set_lease_ttl_ms(value); })->check(CLI::Range(100, 3'600'000));
    Number("drain-seconds", c.drain_seconds(), "How long calls may go on after SIGTERM",
           [&c](int64_t value) { c.set_drain_seconds(static_cast<uint32_t>(value)); })->check(CLI::Range(0, 3600));
    Number("connection-age-seconds", c.connection_age_seconds(), "After which a connection is to be made anew; 0 = never",
           [&c](int64_t value) { c.set_connection_age_seconds(static_cast<uint32_t>(value)); })->check(CLI::Range(0, 1'000'000));
    Decimal("disk-full-percent", c.disk_full_percent(), "The disk is full (no new jobs and leases) when more than this is used ...",
            [&c](double value) { c.set_disk_full_percent(value); })->check(CLI::Range(0.0, 100.0));
    Decimal("disk-full-free-gib", c.disk_full_free_gib(), "... and less than this is free",
            [&c](double value) { c.set_disk_full_free_gib(value); })->check(CLI::NonNegativeNumber);
    Decimal("disk-read-only-percent", c.disk_read_only_percent(), "Nothing more is written when more than this is used ...",
            [&c](double value) { c.set_disk_read_only_percent(value); })->check(CLI::Range(0.0, 100.0));
    Decimal("disk-read-only-free-gib", c.disk_read_only_free_gib(), "... and less than this is free",
            [&c](double value) { c.set_disk_read_only_free_gib(value); })->check(CLI::NonNegativeNumber);
    Text("log-level", c.mutable_log_level(), "trace, debug, info, warn, error or off");
    Text("log-format", c.mutable_log_format(), "text or json");
  }

 private:
  static CLI::Option* Named(CLI::Option* option, const std::string& name) {
    std::string variable = "REFINERYD_";
    for (const char c : name) variable += c == '-' ? '_' : static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
    return option->envname(variable);
  }

  CLI::App& app_;
  v1::CoordinatorConfig* const config_;
  std::string file_;  // read before
};

}  // namespace

v1::CoordinatorConfig DefaultConfig() {
  v1::CoordinatorConfig config;
  config.set_listen("127.0.0.1:7433");
  config.set_metrics_address("127.0.0.1:9464");
  config.set_lease_ttl_ms(limits::kLeaseTtl.count());
  config.set_rate_per_second(200);
  config.set_concurrent_calls(256);
  config.set_drain_seconds(3);
  config.set_connection_age_seconds(1800);
  config.set_disk_full_percent(90);  // the four as in server/store/blob_store.h
  config.set_disk_full_free_gib(20);
  config.set_disk_read_only_percent(97);
  config.set_disk_read_only_free_gib(5);
  config.set_log_level("info");
  config.set_log_format("text");
  return config;
}

StatusOr<CommandLine> ReadCommandLine(int argc, char** argv) {
  CommandLine line;
  line.config = DefaultConfig();
  if (const std::string path = ConfigPath(argc, argv, "REFINERYD_CONFIG"); !path.empty()) {
    RF_RETURN_IF_ERROR(LoadConfig(path, &line.config));
  }
  CLI::App app(kDescription);
  app.footer(kFooter);
  app.set_version_flag("--version", Join("refineryd ", REFINERY_VERSION, " (gRPC ", grpc::Version(), ")"));
  Flags flags(app, &line.config);
  flags.AddAll();
  app.add_flag("--check-config", line.check, "Say whether the settings are good, and stop");
  app.add_option("--restore", line.restore, "Make the folder of --state from this backup, and stop");
  app.add_flag("--print-default-config", line.print, "Write a file for --config with every default, and stop");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    line.exit_code = app.exit(e) == 0 ? 0 : 2;
  }
  return line;
}

ListenSecurity SecurityOf(const v1::CoordinatorConfig& config) {
  return {.tls = {.certificate = config.tls().certificate(), .key = config.tls().key(), .authority = config.tls().authority()},
          .insecure_anywhere = config.insecure_listen_anywhere()};
}

Status CheckConfig(const v1::CoordinatorConfig& config) {
  if (config.state().empty()) return InvalidArgument("--state is missing: the folder of the event log and the artifacts");
  if (config.lease_ttl_ms() < 100 || config.lease_ttl_ms() > 3'600'000) {
    return InvalidArgument("lease_ttl_ms must be 100 to 3600000, is ", config.lease_ttl_ms());
  }
  for (const double percent : {config.disk_full_percent(), config.disk_read_only_percent()}) {
    if (!(percent >= 0 && percent <= 100)) return InvalidArgument("disk_full_percent and disk_read_only_percent go from 0 to 100");
  }
  for (const double gib : {config.disk_full_free_gib(), config.disk_read_only_free_gib()}) {
    if (!(gib >= 0 && gib <= 1e9)) return InvalidArgument("disk_full_free_gib and disk_read_only_free_gib go from 0 to 1e9");
  }
  if (config.disk_full_percent() > config.disk_read_only_percent() ||
      config.disk_full_free_gib() < config.disk_read_only_free_gib()) {
    return InvalidArgument("a disk must be full before it is read-only: disk_full_percent at most disk_read_only_percent, "
                           "disk_full_free_gib at least disk_read_only_free_gib");
  }
  RF_RETURN_IF_ERROR(CheckAddress("listen", config.listen()));
  if (config.metrics_address() != "none") RF_RETURN_IF_ERROR(CheckAddress("metrics_address", config.metrics_address()));
  RF_RETURN_IF_ERROR(InitLogging("refineryd", config.log_level(), config.log_format()));
  RF_RETURN_IF_ERROR(MakeServerCredentials(config.listen(), SecurityOf(config)).status());
  if (!config.principals().empty()) RF_RETURN_IF_ERROR(ReadPrincipals(config.principals()).status());
  return absl::OkStatus();
}

}  // namespace refinery::config

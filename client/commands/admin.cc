// refinery admin: tokens, draining, quotas, backups.

#include <algorithm>
#include <iostream>

#include "client/commands/commands.h"
#include "client/exit_code.h"
#include "client/recipe_input.h"
#include "client/render/json.h"
#include "client/render/table.h"
#include "client/render/terminal.h"
#include "client/task_program.h"
#include "common/digest.h"
#include "common/grpc_status.h"
#include "common/principals.h"
#include "common/process.h"
#include "refinery/v1/admin_service.grpc.pb.h"

namespace refinery::client {
namespace {

struct TokenFlags {
  std::string name, role = "submitter", tenant, certificate, file;
};

StatusOr<int> CreateToken(const TokenFlags& flags) {
  RF_ASSIGN_OR_RETURN(v1::PrincipalFile file, ReadPrincipals(flags.file));
  RF_RETURN_IF_ERROR(CheckName(flags.name, "NAME"));
  RF_ASSIGN_OR_RETURN(const Role role, ParseRole(flags.role));
  for (const v1::Principal& principal : file.principals()) {
    if (principal.name() == flags.name) {
      return AlreadyExists(flags.name, " has a token already; `refinery admin token revoke ", flags.name, "` first");
    }
  }
  v1::Principal* principal = file.add_principals();
  principal->set_name(flags.name);
  principal->set_role(flags.role);
  const bool of_tenant = role == Role::kViewer || role == Role::kSubmitter;
  principal->set_tenant(flags.tenant.empty() && of_tenant ? kDefaultTenant : flags.tenant);
  principal->set_certificate(flags.certificate);
  principal->set_create_time_ms(std::chrono::duration_cast<std::chrono::milliseconds>(
                                    std::chrono::system_clock::now().time_since_epoch()).count());
  RF_ASSIGN_OR_RETURN(const std::string token, NewToken());
  principal->set_token_digest(DigestOf(token));
  RF_RETURN_IF_ERROR(WritePrincipals(flags.file, file));
  if (const Status status = ReadPrincipals(flags.file).status(); !status.ok()) {  // what was asked for makes no sense
    file.mutable_principals()->RemoveLast();
    RF_RETURN_IF_ERROR(WritePrincipals(flags.file, file));
    return status;
  }
  std::cout << token << "\n";
  std::cerr << flags.name << " is a " << flags.role << " now; the token above is shown this once. Keep it in a file of mode 600 and "
            << "give it with --token-file\n";
  return kOk;
}

StatusOr<int> ListTokens(const std::string& path, const Globals& globals) {
  RF_ASSIGN_OR_RETURN(v1::PrincipalFile file, ReadPrincipals(path));
  if (globals.json) {
    std::cout << ToJson(file);
    return kOk;
  }
  std::vector<std::vector<std::string>> rows;
  for (const v1::Principal& principal : file.principals()) {
    rows.push_back({principal.name(), principal.role(), principal.tenant().empty() ? "all" : principal.tenant(),
                    principal.certificate().empty() ? "-" : principal.certificate(), principal.token_digest().empty() ? "no" : "yes"});
  }
  std::cout << TableText({"NAME", "ROLE", "TENANT", "CERTIFICATE", "TOKEN"}, rows);
  return kOk;
}

StatusOr<int> RevokeToken(const std::string& name, const std::string& path) {
  RF_ASSIGN_OR_RETURN(v1::PrincipalFile file, ReadPrincipals(path));
  v1::PrincipalFile kept;
  for (const v1::Principal& principal : file.principals()) {
    if (principal.name() != name) *kept.add_principals() = principal;
  }
  if (kept.principals_size() == file.principals_size()) return NotFound("there is no principal ", name, " in ", path);
  RF_RETURN_IF_ERROR(WritePrincipals(path, kept));
  std::cerr << name << "'s token is worth nothing from the next second on\n";
  return kOk;
}

StatusOr<int> Drain(const std::string& worker, bool off, const Globals& globals) {
  RF_ASSIGN_OR_RETURN(Connection connection, Connect(globals));
  auto admin = v1::AdminService::NewStub(connection.channel);
  grpc::ClientContext context;
  SetDeadline(&context);
  if (worker.empty()) {
    v1::DrainCoordinatorRequest request;
    request.set_drain(!off);
    request.set_request_id(RandomRequestId());
    v1::CoordinatorInfo info;
    RF_RETURN_IF_ERROR(FromGrpc(admin->DrainCoordinator(&context, request, &info)));
    std::cerr << "the coordinator is " << info.state() << ", " << info.tasks_leased() << " tasks run\n";
    return kOk;
  }
  v1::DrainWorkerRequest request;
  request.set_worker(worker);
  request.set_drain(!off);
  request.set_request_id(RandomRequestId());
  v1::WorkerInfo info;
  RF_RETURN_IF_ERROR(FromGrpc(admin->DrainWorker(&context, request, &info)));
  std::cerr << "worker " << info.id() << " is " << info.state() << ", " << info.running_size() << " tasks run\n";
  return kOk;
}

void PrintTenants(const v1::ListTenantsResponse& tenants, const Globals& globals) {
  if (globals.json) {
    std::cout << ToJson(tenants);
    return;
  }
  const auto limit = [](uint32_t value) { return value == 0 ? std::string("-") : Join(value); };
  std::vector<std::vector<std::string>> rows;
  for (const v1::Tenant& tenant : tenants.tenants()) {
    rows.push_back({tenant.name(), Join(tenant.weight()), Join(tenant.tasks_leased(), "/", limit(tenant.max_tasks())),
                    limit(tenant.max_devices()), Join(tenant.jobs(), "/", limit(tenant.max_jobs())), Join(tenant.tasks_ready()),
                    DurationText(tenant.device_seconds())});
  }
  std::cout << TableText({"TENANT", "WEIGHT", "TASKS", "DEVICES", "JOBS", "READY", "DEVICE TIME"}, rows);
}

StatusOr<int> ListQuotas(const Globals& globals) {
  RF_ASSIGN_OR_RETURN(Connection connection, Connect(globals));
  auto admin = v1::AdminService::NewStub(connection.channel);
  v1::ListTenantsResponse all;
  v1::ListTenantsRequest request;
  do {
    grpc::ClientContext context;
    SetDeadline(&context);
    v1::ListTenantsResponse page;
    RF_RETURN_IF_ERROR(FromGrpc(admin->ListTenants(&context, request, &page)));
    all.mutable_tenants()->MergeFrom(page.tenants());
    request.set_page_token(page.next_page_token());
  } while (!request.page_token().empty());
  PrintTenants(all, globals);
  return kOk;
}

StatusOr<int> SetQuota(const v1::Tenant& tenant, const Globals& globals) {
  RF_ASSIGN_OR_RETURN(Connection connection, Connect(globals));
  grpc::ClientContext context;
  SetDeadline(&context);
  v1::SetTenantRequest request;
  *request.mutable_tenant() = tenant;
  request.set_request_id(RandomRequestId());
  v1::ListTenantsResponse shown;
  RF_RETURN_IF_ERROR(FromGrpc(v1::AdminService::NewStub(connection.channel)->SetTenant(&context, request, shown.add_tenants())));
  PrintTenants(shown, globals);
  return kOk;
}

StatusOr<int> Backup(const std::string& folder, const Globals& globals) {
  RF_ASSIGN_OR_RETURN(Connection connection, Connect(globals));
  grpc::ClientContext context;  // without a deadline: it takes as long as the bytes need
  v1::BackupRequest request;
  request.set_folder(std::filesystem::absolute(folder).string());
  request.set_request_id(RandomRequestId());
  v1::BackupResponse response;
  RF_RETURN_IF_ERROR(FromGrpc(v1::AdminService::NewStub(connection.channel)->Backup(&context, request, &response)));
  if (globals.json) {
    std::cout << ToJson(response);
  } else {
    std::cout << response.folder() << "\n";
    std::cerr << "up to event " << response.last_seq() << ", " << response.blobs() << " blobs, " << response.bytes() << " bytes\n";
  }
  return kOk;
}

StatusOr<int> Restore(const std::string& backup, const std::string& state) {
  RF_RETURN_IF_ERROR(BecomeTaskProgram((ProgramFolder() / "refineryd").string(), {"--restore", backup, "--state", state}));
  return kFailed;  // it does not come back
}

CLI::App* Group(CLI::App& app, const char* name, const char* help) {
  CLI::App* group = app.add_subcommand(name, help);
  group->require_subcommand(1);
  return group;
}

void AddTokens(CLI::App& admin, Globals& globals, Result& result) {
  auto flags = std::make_shared<TokenFlags>();
  CLI::App* token = Group(admin, "token", "Who may call; works on the file that refineryd --principals names");
  CLI::App* create = token->add_subcommand("create", "Make a principal and print its token");
  CLI::App* list = token->add_subcommand("list", "List the principals");
  CLI::App* revoke = token->add_subcommand("revoke", "Remove a principal");
  for (CLI::App* command : {create, list, revoke}) {
    command->add_option("--file", flags->file, "file of principals")->envname("REFINERY_PRINCIPALS")->required();
  }
  for (CLI::App* command : {create, revoke}) command->add_option("NAME", flags->name, "who")->required();
  create->add_option("--role", flags->role, "viewer, submitter, worker or admin")->capture_default_str();
  create->add_option("--tenant", flags->tenant, "whose jobs a viewer or submitter sees (default: default)");
  create->add_option("--certificate", flags->certificate, "common name of a client certificate that stands for it too");
  create->callback([flags, &result] { result = CreateToken(*flags); });
  list->callback([flags, &globals, &result] { result = ListTokens(flags->file, globals); });
  revoke->callback([flags, &result] { result = RevokeToken(flags->name, flags->file); });
}

void AddQuotas(CLI::App& admin, Globals& globals, Result& result) {
  struct Flags {
    std::string name;
    double weight = 1;
    uint32_t max_tasks = 0, max_devices = 0, max_jobs = 0;
  };
  auto flags = std::make_shared<Flags>();
  CLI::App* quota = Group(admin, "quota", "Weights and quotas of tenants");
  quota->add_subcommand("list", "List the tenants and what they use")->callback([&globals, &result] {
    result = ListQuotas(globals);
  });
  CLI::App* set = quota->add_subcommand("set", "Set a tenant's weight and quotas, all of them");
  set->add_option("TENANT", flags->name, "name of the tenant")->required();
  set->add_option("--weight", flags->weight, "of its fair share")->check(CLI::PositiveNumber)->capture_default_str();
  set->add_option("--max-tasks", flags->max_tasks, "that run at once; 0 = no limit")->capture_default_str();
  set->add_option("--max-devices", flags->max_devices, "that its tasks hold at once; 0 = no limit")->capture_default_str();
  set->add_option("--max-jobs", flags->max_jobs, "that have not ended; 0 = no limit")->capture_default_str();
  set->callback([flags, &globals, &result] {
    v1::Tenant tenant;
    tenant.set_name(flags->name);
    tenant.set_weight(flags->weight);
    tenant.set_max_tasks(flags->max_tasks);
    tenant.set_max_devices(flags->max_devices);
    tenant.set_max_jobs(flags->max_jobs);
    result = SetQuota(tenant, globals);
  });
}

}  // namespace

void AddAdmin(CLI::App& app, Globals& globals, Result& result) {
  struct Flags {
    std::string worker, folder, state;
    bool off = false;
  };
  auto flags = std::make_shared<Flags>();
  CLI::App* admin = Group(app, "admin", "Tokens, draining, quotas and backups of a coordinator");
  AddTokens(*admin, globals, result);
  AddQuotas(*admin, globals, result);
  CLI::App* drain = admin->add_subcommand("drain", "Grant no more leases; what runs goes on");
  drain->add_option("--worker", flags->worker, "only to this worker");
  drain->add_flag("--off", flags->off, "grant leases again");
  drain->callback([flags, &globals, &result] { result = Drain(flags->worker, flags->off, globals); });
  CLI::App* backup = admin->add_subcommand("backup", "Copy the coordinator's state into a new folder on its machine, while it serves");
  backup->add_option("FOLDER", flags->folder, "must not exist or be empty")->required();
  backup->callback([flags, &globals, &result] { result = Backup(flags->folder, globals); });
  CLI::App* restore = admin->add_subcommand("restore", "Make a state folder from a backup, on this machine; checks every byte");
  restore->add_option("BACKUP", flags->folder, "folder of a backup")->required();
  restore->add_option("--state", flags->state, "must not exist or be empty; then start refineryd with it")->required();
  restore->callback([flags, &result] { result = Restore(flags->folder, flags->state); });
}

}  // namespace refinery::client

#include "client/recipe_input.h"

#include <cstdlib>
#include <random>

#include "absl/strings/ascii.h"
#include "client/render/json.h"
#include "common/artifact_client.h"
#include "common/digest.h"
#include "common/grpc_status.h"
#include "common/recipe.h"

namespace refinery::client {
namespace {

// The name that an uploaded file has in its artifact, whatever it is called here: the same rows are the same artifact.
// CSV is told from JSON lines by its name alone, and so is the plain text that calibration takes.
std::string FileName(const std::string& role, const std::filesystem::path& file) {
  const std::string extension = absl::AsciiStrToLower(file.extension().string());
  if (role == "general" && (extension == ".txt" || extension == ".md")) return "rows.txt";
  return extension == ".csv" ? "rows.csv" : "rows.jsonl";
}

constexpr size_t kDigestPrefix = 7;   // "sha256:"

}  // namespace

StatusOr<RecipeInput> ReadRecipe(const std::filesystem::path& path, const std::filesystem::path& data_folder) {
  RecipeInput input;
  RF_ASSIGN_OR_RETURN(input.recipe, LoadRecipe(path));
  RF_ASSIGN_OR_RETURN(input.files, RecipeFiles(input.recipe, data_folder));
  for (const auto& [role, file] : input.files) {
    RF_ASSIGN_OR_RETURN(input.digests[role], FileArtifactDigest(file, FileName(role, file)));
  }
  return input;
}

Status UploadFiles(Connection& connection, const RecipeInput& input) {
  ArtifactClient client(connection.channel);
  for (const auto& [role, file] : input.files) {
    auto uploaded = client.UploadFile(file, FileName(role, file), role);
    if (!uploaded.ok()) return Annotate(uploaded.status(), Join("cannot upload ", file.string()));
    if (uploaded->digest() != input.digests.at(role))
      return FailedPrecondition(file.string(), " was changed while it was uploaded; try again");
  }
  return absl::OkStatus();
}

StatusOr<v1::Job> CreateJob(Connection& connection, const RecipeInput& input, const std::string& request_id,
                            bool validate_only, const v1::JobPolicy& policy) {
  v1::CreateJobRequest request;
  *request.mutable_recipe() = input.recipe;
  request.mutable_files()->insert(input.digests.begin(), input.digests.end());
  request.set_request_id(request_id);
  request.set_validate_only(validate_only);
  if (policy.ByteSizeLong() > 0) *request.mutable_policy() = policy;
  if (const char* user = std::getenv("USER"); user != nullptr) request.set_owner(user);
  grpc::ClientContext context;
  SetDeadline(&context);
  v1::Job job;
  RF_RETURN_IF_ERROR(FromGrpc(connection.jobs->CreateJob(&context, request, &job)));
  return job;
}

std::string ContentDigest(const RecipeInput& input) {
  std::string text = ToJson(input.recipe, JsonForm::kLine);
  for (const auto& [role, digest] : input.digests) text += Join(role, " ", digest, "\n");
  return DigestOf(text);
}

std::string RequestIdOf(const std::string& digest) {
  std::string hex = digest.substr(kDigestPrefix, 32);
  hex[12] = '8';   // version 8: made by a rule of our own
  hex[16] = 'a';   // the RFC's variant
  return Join(hex.substr(0, 8), "-", hex.substr(8, 4), "-", hex.substr(12, 4), "-", hex.substr(16, 4), "-",
              hex.substr(20));
}

std::string RandomRequestId() {
  std::random_device device;
  std::string bytes;
  for (int i = 0; i < 8; ++i) bytes += Join(device(), "/");
  return RequestIdOf(DigestOf(bytes));
}

}  // namespace refinery::client

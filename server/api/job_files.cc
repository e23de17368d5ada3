#include "server/api/job_files.h"

#include <set>
#include <string_view>

#include "common/digest.h"
#include "common/error_details.h"
#include "server/store/artifacts.h"

namespace refinery::api {
namespace {

constexpr size_t kMaxFiles = 10'000;
// Manifests of a job's files are read on the loop: this bounds for how long.
constexpr uint64_t kMaxManifestBytes = 4 << 20;
constexpr uint64_t kMaxManifestsBytes = 8 << 20;  // of all

// Of the manifest of one artifact; `all` counts those of the call.
Status CheckManifestSize(uint64_t bytes, uint64_t* all) {
  *all += bytes;
  if (bytes > kMaxManifestBytes) {
    return InvalidArgument("its manifest has ", bytes, " bytes; at most ", kMaxManifestBytes,
                           " fit, some 30,000 files: pack them into fewer");
  }
  if (*all > kMaxManifestsBytes) {
    return InvalidArgument("the manifests of files have more than ", kMaxManifestsBytes, " bytes together; pack what they name into fewer files");
  }
  return absl::OkStatus();
}

// Whether all of an artifact is the tenant's: a manifest that he wrote himself must not open blobs of others to him, nor tell him
// that they exist. The words are those of CheckComplete.
Status CheckOwn(Coordinator& coordinator, const std::string& tenant, const std::string& digest, uint64_t* manifests) {
  BlobAccess& access = coordinator.access();
  const bool refers = !tenant.empty() && access.Refers(tenant, digest);
  if (!tenant.empty() && !refers && !access.Knows(tenant, digest)) {
    return FailedPrecondition("artifact ", digest, " was not uploaded; upload its manifest and files first");
  }
  RF_RETURN_IF_ERROR(CheckManifestSize(coordinator.blobs().SizeOf(digest).value_or(0), manifests));
  if (tenant.empty() || refers) return absl::OkStatus();
  RF_ASSIGN_OR_RETURN(const std::vector<FileEntry> files, store::FilesOf(coordinator.blobs(), digest));
  for (const FileEntry& file : files) {
    if (access.Knows(tenant, file.digest)) continue;
    return FailedPrecondition("file ", file.path, " (", file.digest, ") of artifact ", digest, " is missing; upload it first");
  }
  return absl::OkStatus();
}

}  // namespace

Status CheckFiles(const jobs::State& state, Coordinator& coordinator, const std::string& tenant,
                  const google::protobuf::Map<std::string, std::string>& files) {
  if (files.size() > kMaxFiles) return WithField(InvalidArgument("files has more than ", kMaxFiles, " entries"), "files");
  if (!tenant.empty()) coordinator.access().Look(state, tenant);
  uint64_t manifests = 0;
  std::set<std::string_view> checked;
  for (const auto& [role, digest] : files) {
    if (!IsDigest(digest)) {
      return WithField(InvalidArgument("files['", role.substr(0, 80), "'] is not a digest: '", digest.substr(0, 80), "'"), "files");
    }
    if (!checked.insert(digest).second) continue;
    Status status = CheckOwn(coordinator, tenant, digest, &manifests);
    if (status.ok()) status = store::CheckComplete(coordinator.blobs(), digest).status();
    if (!status.ok()) return WithResource(Annotate(status, Join("file '", role.substr(0, 80), "'")), "blob", digest);
  }
  return absl::OkStatus();
}

}  // namespace refinery::api

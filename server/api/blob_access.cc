#include "server/api/blob_access.h"

#include <algorithm>

#include "server/api/upkeep.h"
#include "server/api/visible.h"
#include "server/store/artifacts.h"

namespace refinery::api {

void BlobAccess::Add(const std::vector<store::ArtifactOwner>& owners) {
  std::lock_guard lock(mutex_);
  for (const store::ArtifactOwner& owner : owners) tenants_[owner.tenant].uploaded.insert(owner.digest);
}

bool BlobAccess::Knows(const std::string& tenant, const std::string& digest) const {
  std::lock_guard lock(mutex_);
  const auto found = tenants_.find(tenant);
  return found != tenants_.end() && (found->second.uploaded.contains(digest) || found->second.used.contains(digest));
}

bool BlobAccess::Refers(const std::string& tenant, const std::string& digest) const {
  std::lock_guard lock(mutex_);
  const auto found = tenants_.find(tenant);
  return found != tenants_.end() && found->second.found.contains(digest);
}

void BlobAccess::Look(const jobs::State& state, const std::string& name) {
  std::lock_guard lock(mutex_);
  Tenant& tenant = tenants_[name];
  if (tenant.seq == state.last_seq) return;
  std::vector<std::string> artifacts;
  for (const auto& [id, job] : state.jobs) {
    if (job.last_seq > tenant.seq && TenantOf(job) == name) AddReferences(job, &artifacts);
  }
  for (std::string& artifact : artifacts) {
    if (!tenant.used.contains(artifact)) tenant.found.insert(std::move(artifact));
  }
  tenant.seq = state.last_seq;
}

void BlobAccess::Rewind(uint64_t seq) {
  std::lock_guard lock(mutex_);
  for (auto& [name, tenant] : tenants_) tenant.seq = std::min(tenant.seq, seq);
}

void BlobAccess::Expand(store::BlobStore& blobs, const std::string& name) {
  std::set<std::string> found;
  {
    std::lock_guard lock(mutex_);
    found = tenants_[name].found;
  }
  for (const std::string& artifact : found) {
    const StatusOr<std::vector<FileEntry>> files = store::FilesOf(blobs, artifact);
    std::lock_guard lock(mutex_);
    Tenant& tenant = tenants_[name];
    tenant.used.insert(artifact);
    if (!files.ok()) continue;  // lost for now; looked at again the next time
    for (const FileEntry& file : *files) tenant.used.insert(file.digest);
    tenant.found.erase(artifact);
  }
}

std::vector<store::ArtifactOwner> BlobAccess::Gone(const store::BlobStore& blobs) const {
  std::vector<store::ArtifactOwner> owners;
  {
    std::lock_guard lock(mutex_);
    for (const auto& [name, tenant] : tenants_) {
      for (const std::string& digest : tenant.uploaded) owners.push_back({.digest = digest, .tenant = name});
    }
  }
  std::erase_if(owners, [&](const store::ArtifactOwner& owner) { return blobs.IsStored(owner.digest); });
  return owners;
}

std::vector<store::ArtifactOwner> BlobAccess::Forget(const store::BlobStore& blobs,
                                                     const std::vector<store::ArtifactOwner>& gone) {
  std::vector<store::ArtifactOwner> forgotten;
  std::lock_guard lock(mutex_);
  for (const store::ArtifactOwner& owner : gone) {
    if (blobs.IsStored(owner.digest)) continue;  // uploaded again
    tenants_[owner.tenant].uploaded.erase(owner.digest);
    forgotten.push_back(owner);
  }
  return forgotten;
}

}  // namespace refinery::api

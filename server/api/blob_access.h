// server/api/blob_access.h
//
// Which blobs a tenant may see: those that its callers uploaded (the table artifact_owner of the event log) and those of the artifacts
// that its jobs use or made. A blob that only others have does not exist for it: the store keeps one copy, but everyone who uploads it
// must send all the bytes. Callers of all tenants (admins, workers) see everything and are not asked about here.
//
// What jobs refer to is looked up when something unknown is asked for: the loop names the artifacts that were added since the last
// time, then their manifests are read by whoever asked.
//
// Threads: any, but for what says "loop".

#pragma once

#include <map>
#include <mutex>
#include <set>
#include <string>
#include <unordered_set>
#include <vector>

#include "common/status.h"
#include "server/jobs/state.h"
#include "server/store/blob_store.h"
#include "server/store/event_log.h"

namespace refinery::api {

class BlobAccess {
 public:
  // At start; afterwards for uploads, once they are durable.
  void Add(const std::vector<store::ArtifactOwner>& owners);
  // Whether the tenant is known to have the blob.
  bool Knows(const std::string& tenant, const std::string& digest) const;

  // Whether an artifact as a whole belongs to one of the tenant's jobs that Look saw.
  bool Refers(const std::string& tenant, const std::string& digest) const;

  // Loop: takes note of the artifacts that the tenant's jobs refer to.
  void Look(const jobs::State& state, const std::string& tenant);
  // Loop: events after `seq` were taken back; later ones will have their numbers.
  void Rewind(uint64_t seq);
  // Reads the manifests of what Look found.
  void Expand(store::BlobStore& blobs, const std::string& tenant);

  // Of uploads: those whose blob is not there any more; and forgets them, as far as that is still so (loop).
  std::vector<store::ArtifactOwner> Gone(const store::BlobStore& blobs) const;
  std::vector<store::ArtifactOwner> Forget(const store::BlobStore& blobs, const std::vector<store::ArtifactOwner>& gone);

 private:
  struct Tenant {
    std::unordered_set<std::string> uploaded;
    std::unordered_set<std::string> used;  // artifacts of its jobs and their blobs
    std::set<std::string> found;           // artifacts, by Look; Expand has not read their manifests yet
    uint64_t seq = 0;                      // last event of jobs that were looked at
  };
  mutable std::mutex mutex_;
  std::map<std::string, Tenant> tenants_;  // guarded
};

}  // namespace refinery::api

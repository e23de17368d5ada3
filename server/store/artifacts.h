// server/store/artifacts.h
//
// Folder artifacts in a blob store: the blob with the manifest text names the artifact, its lines name the files' blobs.
//
// Threads: any.

#pragma once

#include <map>
#include <string>
#include <vector>

#include "common/digest.h"
#include "common/status.h"
#include "refinery/v1/artifact.pb.h"
#include "server/store/blob_store.h"

namespace refinery::store {

// Stores a folder given as path -> bytes; the result carries `name`.
StatusOr<v1::ArtifactRef> PutArtifact(BlobStore& blobs, const std::string& name,
                                      const std::map<std::string, std::string>& files);

// The files of an artifact. NOT_FOUND when the manifest is not there, DATA_LOSS when it is not one.
StatusOr<std::vector<FileEntry>> FilesOf(BlobStore& blobs, const std::string& digest);

// Bytes of all files. FAILED_PRECONDITION naming the first blob that is missing or has another size than the manifest says.
StatusOr<uint64_t> CheckComplete(BlobStore& blobs, const std::string& digest);

// One file's bytes. NOT_FOUND when the artifact has no such path.
StatusOr<std::string> ReadArtifactFile(BlobStore& blobs, const std::string& digest, const std::string& path);

}  // namespace refinery::store

// common/tls.h
//
// Certificates of one side of a connection, as files. gRPC reads them by itself, again and again, and says nothing when they are
// wrong; so they are checked here first, with a sentence that names the file.
//
// Threads: no shared state.

#pragma once

#include <chrono>
#include <filesystem>

#include "common/status.h"

namespace refinery {

// PEM files. Replace them by renaming: key and certificate must fit each other whenever they are read.
struct TlsFiles {
  std::filesystem::path certificate;  // ours, followed by its chain
  std::filesystem::path key;
  std::filesystem::path authority;    // certificates that sign those which we accept from the other side

  bool any() const { return !certificate.empty() || !key.empty() || !authority.empty(); }
  bool has_identity() const { return !certificate.empty(); }
};

// NOT_FOUND, or INVALID_ARGUMENT for a file that is no PEM, a key that does not fit the certificate, a certificate without key or
// the other way round. FAILED_PRECONDITION when the certificate has expired or is not valid yet.
Status CheckTlsFiles(const TlsFiles& files);

// How long the first certificate of a PEM file is still valid; negative when it has expired. Errors as CheckTlsFiles.
StatusOr<std::chrono::hours> TimeToExpiry(const std::filesystem::path& certificate);

}  // namespace refinery

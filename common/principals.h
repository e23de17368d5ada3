// common/principals.h
//
// The file of those who may call the coordinator: a PrincipalFile (proto/refinery/v1/config.proto) in YAML. Tokens are 256 random
// bits; only their SHA-256 is kept, so that who reads the file cannot call. (A slow hash is for passwords, which can be guessed.)
//
// Errors: INVALID_ARGUMENT naming file and line or principal.  Threads: no shared state.

#pragma once

#include <filesystem>
#include <string>

#include "common/status.h"
#include "refinery/v1/config.pb.h"

namespace refinery {

enum class Role { kViewer = 1, kSubmitter = 2, kWorker = 4, kAdmin = 8 };

StatusOr<Role> ParseRole(const std::string& name);
const char* RoleName(Role role);

// The tenant of jobs and principals that name none.
inline constexpr char kDefaultTenant[] = "default";
// INVALID_ARGUMENT unless 1 to 63 lower-case letters, digits and inner '-'.
Status CheckName(const std::string& name, const std::string& what);

// An empty file when there is none. Checks names, roles and digests, and that nothing stands twice.
StatusOr<v1::PrincipalFile> ReadPrincipals(const std::filesystem::path& path);
// Atomically, readable by the owner only.
Status WritePrincipals(const std::filesystem::path& path, const v1::PrincipalFile& file);

// "rf_" and 43 characters of 256 random bits.
StatusOr<std::string> NewToken();

}  // namespace refinery

// tests/support/certificates.h
//
// An authority of one's own and certificates for loopback, made by the openssl program.
//
//   Certificates authority(folder);                     // GTEST_SKIP when !authority.ok()
//   TlsFiles server = authority.Issue("server");        // <folder>/server.pem, server.key, authority.pem

#pragma once

#include <cstdlib>
#include <filesystem>
#include <string>

#include "common/files.h"
#include "common/status.h"
#include "common/tls.h"

namespace refinery::testing {

class Certificates {
 public:
  explicit Certificates(std::filesystem::path folder, const std::string& name = "authority")
      : folder_(std::move(folder)), name_(name) {
    ok_ = Run(Join("openssl req -x509 ", kKey, " -days 2 -subj /CN=", name, " -keyout ", Path(name, "key"), " -out ",
                   Path(name, "pem")));
  }
  bool ok() const { return ok_; }

  // `days` of validity from now; a later call with the same name replaces the files by renaming.
  TlsFiles Issue(const std::string& name, int days = 1) {
    const std::string extensions = Path(name, "ext");
    ok_ = ok_ && WriteFileAtomically(extensions, "subjectAltName=DNS:localhost,IP:127.0.0.1\n").ok() &&
          Run(Join("openssl req ", kKey, " -subj /CN=", name, " -keyout ", Path(name, "newkey"), " -out ", Path(name, "csr"))) &&
          Run(Join("openssl x509 -req -in ", Path(name, "csr"), " -CA ", Path(name_, "pem"), " -CAkey ", Path(name_, "key"),
                   " -CAcreateserial -days ", days, " -extfile ", extensions, " -out ", Path(name, "newpem")));
    if (ok_) {
      std::filesystem::rename(Path(name, "newkey"), Path(name, "key"));
      std::filesystem::rename(Path(name, "newpem"), Path(name, "pem"));
    }
    return {.certificate = Path(name, "pem"), .key = Path(name, "key"), .authority = Path(name_, "pem")};
  }

 private:
  static constexpr const char* kKey = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes";

  static bool Run(const std::string& command) { return std::system(Join(command, " >/dev/null 2>&1").c_str()) == 0; }
  std::string Path(const std::string& name, const std::string& extension) const {
    return (folder_ / Join(name, ".", extension)).string();
  }

  const std::filesystem::path folder_;
  const std::string name_;
  bool ok_ = false;
};

}  // namespace refinery::testing

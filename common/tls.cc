#include "common/tls.h"

#include <openssl/bio.h>
#include <openssl/pem.h>
#include <openssl/x509.h>

#include <memory>
#include <string>

#include "common/files.h"

namespace refinery {
namespace {

constexpr uint64_t kMaxPemBytes = 4 << 20;

struct Free {
  void operator()(X509* p) const { X509_free(p); }
  void operator()(EVP_PKEY* p) const { EVP_PKEY_free(p); }
  void operator()(BIO* p) const { BIO_free(p); }
};
using Certificate = std::unique_ptr<X509, Free>;
using Key = std::unique_ptr<EVP_PKEY, Free>;

StatusOr<Certificate> ReadCertificate(const std::filesystem::path& path) {
  RF_ASSIGN_OR_RETURN(const std::string text, ReadFile(path, kMaxPemBytes));
  const std::unique_ptr<BIO, Free> bio(BIO_new_mem_buf(text.data(), static_cast<int>(text.size())));
  Certificate certificate(PEM_read_bio_X509(bio.get(), nullptr, nullptr, nullptr));
  if (certificate == nullptr) return InvalidArgument(path.string(), " holds no certificate in PEM form");
  return certificate;
}

StatusOr<Key> ReadKey(const std::filesystem::path& path) {
  RF_ASSIGN_OR_RETURN(const std::string text, ReadFile(path, kMaxPemBytes));
  const std::unique_ptr<BIO, Free> bio(BIO_new_mem_buf(text.data(), static_cast<int>(text.size())));
  // A callback that knows no password: otherwise OpenSSL would ask the terminal.
  Key key(PEM_read_bio_PrivateKey(bio.get(), nullptr, [](char*, int, int, void*) { return -1; }, nullptr));
  if (key == nullptr) return InvalidArgument(path.string(), " holds no private key in PEM form without a password");
  return key;
}

}  // namespace

Status CheckTlsFiles(const TlsFiles& files) {
  if (files.certificate.empty() != files.key.empty()) {
    return InvalidArgument("a certificate needs its key and a key its certificate: give both --tls-certificate and --tls-key");
  }
  if (files.has_identity()) {
    RF_ASSIGN_OR_RETURN(const Certificate certificate, ReadCertificate(files.certificate));
    RF_ASSIGN_OR_RETURN(const Key key, ReadKey(files.key));
    if (X509_check_private_key(certificate.get(), key.get()) != 1) {
      return InvalidArgument("the key in ", files.key.string(), " does not belong to the certificate in ",
                             files.certificate.string());
    }
    if (X509_cmp_current_time(X509_get0_notAfter(certificate.get())) < 0) {
      return FailedPrecondition("the certificate in ", files.certificate.string(), " has expired; replace it and its key");
    }
    if (X509_cmp_current_time(X509_get0_notBefore(certificate.get())) > 0) {
      return FailedPrecondition("the certificate in ", files.certificate.string(), " is not valid yet; check the clock");
    }
  }
  if (!files.authority.empty()) RF_RETURN_IF_ERROR(ReadCertificate(files.authority).status());
  return absl::OkStatus();
}

StatusOr<std::chrono::hours> TimeToExpiry(const std::filesystem::path& path) {
  RF_ASSIGN_OR_RETURN(const Certificate certificate, ReadCertificate(path));
  int days = 0, seconds = 0;
  if (ASN1_TIME_diff(&days, &seconds, nullptr, X509_get0_notAfter(certificate.get())) != 1) {
    return InvalidArgument(path.string(), " has a certificate whose end cannot be read");
  }
  return std::chrono::hours(days * 24 + seconds / 3600);
}

}  // namespace refinery

#include "common/digest.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>

#include "common/files.h"
#include "tests/support/status_matchers.h"

namespace refinery {
namespace {

namespace fs = std::filesystem;
using refinery::testing::IsOk;
using refinery::testing::StatusCodeIs;

// Known answers of FIPS 180-4.
TEST(DigestTest, KnownAnswers) {
  EXPECT_EQ(DigestOf(""), "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(DigestOf("abc"), "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  EXPECT_EQ(DigestOf(std::string(1000000, 'a')),
            "sha256:cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

TEST(DigestTest, PiecesHashLikeTheWhole) {
  Sha256 hash;
  hash.Update("a");
  hash.Update("");
  hash.Update("bc");
  EXPECT_EQ(hash.Finish(), DigestOf("abc"));
}

TEST(DigestTest, FormOfADigest) {
  EXPECT_TRUE(IsDigest(DigestOf("x")));
  const std::string good = DigestOf("x");
  EXPECT_FALSE(IsDigest(good.substr(0, good.size() - 1)));
  EXPECT_FALSE(IsDigest(good + "0"));
  EXPECT_FALSE(IsDigest("sha256:" + std::string(64, 'A')));
  EXPECT_FALSE(IsDigest("sha512:" + std::string(64, 'a')));
  EXPECT_FALSE(IsDigest(""));
}

// The first eight bytes of the hash; one of them taken with sha256sum.
TEST(DigestTest, SeedsDeriveFromSeedAndPath) {
  const std::string hex = DigestOf("1/trial/0").substr(7, 16);
  EXPECT_EQ(DeriveSeed(1, "trial/0"), std::stoull(hex, nullptr, 16));
  EXPECT_EQ(DeriveSeed(0, "abc"), 0xdd3a64d9a3efea66u) << "printf '0/abc' | sha256sum";
  EXPECT_NE(DeriveSeed(1, "trial/0"), DeriveSeed(1, "trial/1"));
  EXPECT_NE(DeriveSeed(1, "trial/0"), DeriveSeed(2, "trial/0"));
}

TEST(DigestTest, ManifestsAreSortedAndReadBack) {
  const std::string text = ManifestText({{.path = "b/c d", .digest = DigestOf("1"), .size = 1},
                                         {.path = "a", .digest = DigestOf("2"), .size = 18446744073709551615u}});
  EXPECT_EQ(text, DigestOf("2") + " 18446744073709551615 a\n" + DigestOf("1") + " 1 b/c d\n");
  StatusOr<std::vector<FileEntry>> files = ParseManifest(text);
  ASSERT_THAT(files, IsOk());
  EXPECT_EQ(ManifestText(*files), text);
  EXPECT_THAT(ParseManifest(""), IsOk());
}

TEST(DigestTest, BadManifestsAreRefused) {
  const std::string d = DigestOf("x");
  for (const std::string& text :
       {d + " 1 a", d + " 1\n", d + " -1 a\n", d + " 1x a\n", d + " 99999999999999999999 a\n",
        std::string("sha256:0 1 a\n"), d + " 1 /a\n", d + " 1 ../a\n", d + " 1 a/../b\n", d + " 1 a//b\n",
        d + " 1 ./a\n", d + " 1 a/\n", d + " 1 \n", d + " 1 b\n" + d + " 1 a\n", d + " 1 a\n" + d + " 1 a\n",
        d + " 1 " + std::string("a\0b", 3) + "\n"})
    EXPECT_THAT(ParseManifest(text), StatusCodeIs(absl::StatusCode::kInvalidArgument)) << text;
}

TEST(DigestTest, FoldersAreListed) {
  const fs::path folder = fs::path(::testing::TempDir()) / "digest_test";
  fs::remove_all(folder);
  ASSERT_THAT(WriteFileAtomically(folder / "z", "abc"), IsOk());
  ASSERT_THAT(WriteFileAtomically(folder / "sub/a", ""), IsOk());
  StatusOr<std::vector<FileEntry>> files = ListFolder(folder);
  ASSERT_THAT(files, IsOk());
  EXPECT_EQ(ManifestText(*files), DigestOf("") + " 0 sub/a\n" + DigestOf("abc") + " 3 z\n");
  fs::create_symlink("z", folder / "link");
  EXPECT_THAT(ListFolder(folder), StatusCodeIs(absl::StatusCode::kFailedPrecondition));
  fs::remove_all(folder);
  EXPECT_THAT(ListFolder(folder), StatusCodeIs(absl::StatusCode::kNotFound));
  EXPECT_THAT(DigestOfFile(folder / "z"), StatusCodeIs(absl::StatusCode::kNotFound));
}

}  // namespace
}  // namespace refinery

#include "common/files.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>

#include "tests/support/status_matchers.h"

namespace refinery {
namespace {

namespace fs = std::filesystem;
using refinery::testing::IsOk;
using refinery::testing::IsOkAndHolds;
using refinery::testing::StatusCodeIs;

class FilesTest : public ::testing::Test {
 protected:
  void SetUp() override { fs::remove_all(folder_); }
  void TearDown() override { fs::remove_all(folder_); }

  const fs::path folder_ = fs::path(::testing::TempDir()) / "files_test";
};

TEST_F(FilesTest, WhatIsWrittenIsRead) {
  const std::string bytes("a\0b\r\n\xff", 6);
  ASSERT_THAT(WriteFileAtomically(folder_ / "deep/er/file", bytes), IsOk());
  EXPECT_THAT(ReadFile(folder_ / "deep/er/file"), IsOkAndHolds(bytes));
}

TEST_F(FilesTest, WritingReplacesAndLeavesNothingBeside) {
  ASSERT_THAT(WriteFileAtomically(folder_ / "file", "long old text"), IsOk());
  ASSERT_THAT(WriteFileAtomically(folder_ / "file", "new"), IsOk());
  EXPECT_THAT(ReadFile(folder_ / "file"), IsOkAndHolds(std::string("new")));
  EXPECT_EQ(std::distance(fs::directory_iterator(folder_), fs::directory_iterator()), 1);
}

TEST_F(FilesTest, LimitsAndMissingFiles) {
  ASSERT_THAT(WriteFileAtomically(folder_ / "file", "12345"), IsOk());
  EXPECT_THAT(ReadFile(folder_ / "file", 5), IsOk());
  EXPECT_THAT(ReadFile(folder_ / "file", 4), StatusCodeIs(absl::StatusCode::kResourceExhausted));
  EXPECT_THAT(ReadFile(folder_ / "none"), StatusCodeIs(absl::StatusCode::kNotFound));
  EXPECT_THAT(ReadFile(folder_), StatusCodeIs(absl::StatusCode::kNotFound)) << "a folder is no file";
  EXPECT_THAT(SyncPath(folder_ / "none"), StatusCodeIs(absl::StatusCode::kNotFound));
}

TEST_F(FilesTest, AFileInTheWayIsAnError) {
  ASSERT_THAT(WriteFileAtomically(folder_ / "file", "x"), IsOk());
  EXPECT_FALSE(WriteFileAtomically(folder_ / "file/below", "y").ok());
  EXPECT_FALSE(CreateFolders(folder_ / "file").ok() && fs::is_directory(folder_ / "file"));
}

}  // namespace
}  // namespace refinery

// client/recipe_input.h
//
// A recipe with the files it names, as a user submits it.

#pragma once

#include <filesystem>
#include <map>
#include <string>

#include "client/globals.h"
#include "common/status.h"
#include "refinery/v1/recipe.pb.h"

namespace refinery::client {

struct RecipeInput {
  v1::Recipe recipe;
  std::map<std::string, std::filesystem::path> files;   // role -> path
  std::map<std::string, std::string> digests;           // role -> digest of the artifact that holds the file
};

// INVALID_ARGUMENT or NOT_FOUND, naming the line, the field or the file, and what to do.
StatusOr<RecipeInput> ReadRecipe(const std::filesystem::path& path, const std::filesystem::path& data_folder);
// Uploads what the coordinator lacks.
Status UploadFiles(Connection& connection, const RecipeInput& input);
StatusOr<v1::Job> CreateJob(Connection& connection, const RecipeInput& input, const std::string& request_id,
                            bool validate_only = false, const v1::JobPolicy& policy = {});

// The digest of recipe and files: the same content gives the same text, on any machine.
std::string ContentDigest(const RecipeInput& input);
// A UUID made of a digest, and one made of chance.
std::string RequestIdOf(const std::string& digest);
std::string RandomRequestId();

}  // namespace refinery::client

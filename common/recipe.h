// common/recipe.h
//
// Recipes: YAML -> Recipe. The proto is the schema; an unknown key is an error that names the line and the nearest key.

#pragma once

#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "common/status.h"
#include "common/yaml_message.h"  // Nearest, MessageToYaml
#include "refinery/v1/recipe.pb.h"

namespace refinery {

// Reads, fills defaults in and checks. INVALID_ARGUMENT "FILE:LINE: ..." naming the field and the fix; NOT_FOUND.
// Relative model and file paths are resolved against the recipe's folder and made absolute; "~" is expanded; what holds
// "://" stays as it is. A zero that is written out where zero means "the default" is refused: it would be silently
// another number. A recipe without `name` is called as its file.
StatusOr<v1::Recipe> LoadRecipe(const std::filesystem::path& path);
// The same for text; `name` stands for the file in messages, `folder` for its place.
StatusOr<v1::Recipe> ParseRecipe(const std::string& yaml, const std::string& name, const std::filesystem::path& folder);

// Every default of recipe.proto. Running it twice changes nothing.
void FillDefaults(v1::Recipe* recipe);
// INVALID_ARGUMENT naming the field ("distill.temperature must be > 0, is -1").
Status CheckRecipe(const v1::Recipe& recipe);

// Files that the client must upload before CreateJob: role -> path. `data_folder` holds the pulled benchmarks as
// <benchmark>/<split>.jsonl. NOT_FOUND names the missing file and `refinery data pull <benchmark>`.
StatusOr<std::map<std::string, std::filesystem::path>> RecipeFiles(const v1::Recipe& recipe,
                                                                   const std::filesystem::path& data_folder);

// Benchmarks whose row format is known: name -> official scored split.
const std::map<std::string, std::string>& KnownBenchmarks();

// Parameters that a search may vary, and the optimizers.
const std::vector<std::string>& KnownParameters();
const std::vector<std::string>& KnownOptimizers();

}  // namespace refinery

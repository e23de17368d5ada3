#include "worker/task/seeds.h"

namespace refinery::task {

StatusOr<std::vector<data::MultipleChoiceItem>> ReadSeeds(const TaskContext& context, const std::string& task, int64_t limit) {
  RF_ASSIGN_OR_RETURN(std::filesystem::path file, context.InputJsonl("seeds"));
  return data::ReadItems(task, file, static_cast<size_t>(limit));
}

}  // namespace refinery::task

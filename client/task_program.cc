#include "client/task_program.h"

#include <signal.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <iostream>

#include "common/process.h"

namespace refinery::client {

Status BecomeTaskProgram(const std::string& given, std::vector<std::string> arguments) {
  const std::filesystem::path program = given.empty() ? ProgramFolder() / "refinery-task" : std::filesystem::path(given);
  arguments.insert(arguments.begin(), program.string());
  std::vector<char*> pointers;
  for (std::string& part : arguments) pointers.push_back(part.data());
  pointers.push_back(nullptr);
  std::cout << std::flush;
  setenv("OMP_WAIT_POLICY", "PASSIVE", /*overwrite=*/0);  // threads that spin slow down whatever else runs here
  signal(SIGPIPE, SIG_DFL);                               // an ignored signal would stay ignored: `| head` must end the program
  ::execv(pointers[0], pointers.data());
  return NotFound("cannot start ", program.string(), ": ", std::strerror(errno),
                  "; it belongs beside this program, or name it with --task-program");
}

}  // namespace refinery::client

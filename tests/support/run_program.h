// tests/support/run_program.h
//
// Runs a program to its end and keeps what it printed.

#pragma once

#include <poll.h>
#include <unistd.h>

#include <array>
#include <map>
#include <string>
#include <vector>

#include "common/process.h"

namespace refinery::testing {

struct Output {
  int code = -1;      // exit code, or 128 + signal
  std::string out;
  std::string err;
};

inline Output RunProgram(const std::vector<std::string>& command, const std::map<std::string, std::string>& environment) {
  Output output;
  auto process = Process::Start({.command = command, .environment = environment});
  if (!process.ok()) {
    output.err = process.status().ToString();
    return output;
  }
  std::array<pollfd, 2> fds = {pollfd{(*process)->stdout_fd(), POLLIN, 0}, pollfd{(*process)->stderr_fd(), POLLIN, 0}};
  while (fds[0].fd >= 0 || fds[1].fd >= 0) {
    ::poll(fds.data(), fds.size(), -1);
    for (size_t i = 0; i < fds.size(); ++i) {
      if (fds[i].fd < 0 || fds[i].revents == 0) continue;
      std::array<char, 65536> buffer;
      ssize_t got = ::read(fds[i].fd, buffer.data(), buffer.size());
      if (got <= 0) fds[i].fd = -1;
      else (i == 0 ? output.out : output.err).append(buffer.data(), static_cast<size_t>(got));
    }
  }
  ExitInfo info = (*process)->Wait();
  output.code = info.signal != 0 ? 128 + info.signal : info.code;
  return output;
}

}  // namespace refinery::testing

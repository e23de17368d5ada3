// client/interrupt.h
//
// Ctrl-C as something to ask for, so that a command that follows a job can detach cleanly instead of dying half-way.
//
// Threads: safe for any; there is one per process.

#pragma once

namespace refinery::client {

class Interrupt {
 public:
  // From here on SIGINT, SIGTERM and SIGHUP are recorded; a second one ends the program with code 130.
  Interrupt();
  bool raised() const;
};

}  // namespace refinery::client

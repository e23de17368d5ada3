// client/exit_code.h
//
// What `refinery` returns to the shell. Documented in --help.

#pragma once

namespace refinery::client {

enum ExitCode : int {
  kOk = 0,
  kFailed = 1,        // the job failed, or an internal error
  kWrongInput = 2,    // a wrong recipe, file, flag or model, or a coordinator that does not answer
  kJobCancelled = 3,
  kDetached = 130,    // Ctrl-C: the job goes on
};

}  // namespace refinery::client

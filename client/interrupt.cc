#include "client/interrupt.h"

#include <signal.h>
#include <unistd.h>

#include <initializer_list>

#include "client/exit_code.h"

namespace refinery::client {
namespace {

volatile sig_atomic_t g_raised = 0;

void OnSignal(int) {
  if (g_raised != 0) _exit(kDetached);
  g_raised = 1;
}

}  // namespace

Interrupt::Interrupt() {
  struct sigaction action {};
  action.sa_handler = OnSignal;
  action.sa_flags = SA_RESTART;
  for (int number : {SIGINT, SIGTERM, SIGHUP}) sigaction(number, &action, nullptr);
}

bool Interrupt::raised() const { return g_raised != 0; }

}  // namespace refinery::client

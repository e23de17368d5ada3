// server/config/notify.h
//
// Tells the program that started us (systemd with Type=notify, or whatever sets NOTIFY_SOCKET) how we do: "READY=1", "STOPPING=1".
//
// Source: the protocol of sd_notify(3): one datagram to the socket that the variable names; a leading '@' stands for a zero byte.
// Errors: INVALID_ARGUMENT for a name that cannot be one, UNAVAILABLE when nobody takes the datagram. OK without the variable.
// Threads: safe for any.

#pragma once

#include <string_view>

#include "common/status.h"

namespace refinery::config {

Status NotifySupervisor(std::string_view message);

}  // namespace refinery::config

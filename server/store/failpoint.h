// server/store/failpoint.h
//
// Places where a test may end the process as kill -9 would: REFINERY_FAILPOINT=NAME ends it with _exit(137) when the place NAME
// is passed, NAME:N at its N-th time. Always compiled in; without the variable a place costs one comparison.
//
// Threads: any.

#pragma once

#include <array>
#include <string_view>

#include "common/status.h"

namespace refinery::store {

// Every place. Failpoint refuses others, so a test that walks this list walks them all.
inline constexpr std::array<std::string_view, 12> kFailpoints = {
    "append_begin",            // events decided, nothing written
    "append_before_commit",    // written, not committed
    "append_after_commit",     // durable, nobody knows
    "reply_before",            // durable, counted and logged; the callers have not been answered
    "blob_write",              // some bytes of an upload are there
    "blob_before_rename",      // all bytes synced under their temporary name
    "blob_after_rename",       // named, its folder not synced
    "snapshot_before_rename",  // made, not on disk
    "snapshot_after_rename",   // on disk, older ones not removed
    "compact_before_commit",   // old events deleted, not committed
    "gc_before_unlink",        // a blob is about to go
    "checkpoint_wal",          // before a clean stop folds the WAL into the database
};

// INVALID_ARGUMENT when REFINERY_FAILPOINT names no place; programs ask at their start.
Status CheckFailpointSetting();

// Ends the process here when the variable says so. RF_CHECKs that `name` is in the list.
void Failpoint(std::string_view name);

}  // namespace refinery::store

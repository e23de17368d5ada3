// server/security/methods.h
//
// Who may call what: every method of the API with the roles that may call it. A method that is not in the table is refused, and
// a test holds the table against the protocol's descriptors.
//
// Health and reflection are open to whoever reaches the port: they tell no more than that a Refinery coordinator is there.

#pragma once

#include <string_view>
#include <vector>

namespace refinery::security {

struct Method {
  std::string_view name;   // "/refinery.v1.JobService/CreateJob"
  int roles = 0;           // a sum of refinery::Role
  bool audited = false;    // a change that people make: every call is written to the audit log
};

const std::vector<Method>& Methods();
// Null for an unknown one.
const Method* FindMethod(std::string_view name);

}  // namespace refinery::security

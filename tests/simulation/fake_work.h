// tests/simulation/fake_work.h
//
// Jobs of the simulation and what their tasks make. Tasks are deterministic: their outcome follows from their spec, so a job that
// was disturbed must end with the same artifact as one that was not.

#pragma once

#include <string>

#include "refinery/v1/worker_service.pb.h"
#include "server/jobs/core.h"

namespace refinery::simulation {

// Job `number`: small, with every stage; some share tasks with others.
v1::Recipe JobRecipe(int number);
// A job with `shards` tasks that are ready together, twice.
v1::Recipe WideRecipe(int number, int shards);
v1::JobCreated Created(const v1::Recipe& recipe);

// The end that an undisturbed attempt reports: its output, and the loss where it trains; a few trainings diverge.
void SetOutcome(const v1::TaskSpec& spec, v1::CompleteTaskRequest* end);

// The artifact of a job that nothing disturbs; empty when it fails (all trials diverge).
std::string UndisturbedArtifact(const v1::Recipe& recipe);

}  // namespace refinery::simulation

// worker/task/runtime/torch.h
//
// The part of LibTorch that task libraries use: tensors and autograd. It is the precompiled header of every target below
// worker/task (3 s instead of 11 s a file); <torch/torch.h> would double that and brings nothing we need.

#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#ifndef _OPENMP
#error "compile with -fopenmp: without it at::parallel_for is a plain loop"
#endif

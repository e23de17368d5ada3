// server/search/sobol.h
//
// Scrambled Sobol points in the unit cube. The net's points come from boost::random::sobol (Joe and Kuo's directions);
// each coordinate is then scrambled by a hash whose bits depend only on higher bits (nested uniform scrambling after
// Owen 1995, in Laine and Karras' form, as in Burley 2020, "Practical Hash-based Owen Scrambling"). So every aligned
// block of 2^k points still has exactly one point in each of 2^k equal slices of every axis, and every seed gives other
// points.
//
// Threads: one per object.

#pragma once

#include <boost/random/sobol.hpp>
#include <cstdint>
#include <vector>

namespace refinery::search {

class ScrambledSobol {
 public:
  // dimensions >= 1.
  ScrambledSobol(uint32_t dimensions, uint64_t seed);

  // The next point, each coordinate in [0, 1).
  std::vector<double> Next();

 private:
  boost::random::sobol engine_;
  std::vector<uint32_t> seeds_;  // one per dimension
  bool first_ = true;            // Boost leaves out the first point of the net, the origin
};

}  // namespace refinery::search

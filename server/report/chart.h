// server/report/chart.h
//
// Line and scatter charts as SVG: axes with round ticks and labels with units, error bars, legend, labelled points. The
// text of names and labels is escaped.

#pragma once

#include <string>
#include <vector>

namespace refinery::report {

struct ChartPoint {
  double x = 0;
  double y = 0;
  double error = 0;   // half the height of the error bar; 0 = none
  std::string label;  // beside the point
};

struct Series {
  std::string name;  // in the legend; empty = not listed
  std::string color;
  std::vector<ChartPoint> points;
  bool line = false;
  bool steps = false;  // the line goes right, then down
  bool dashed = false;
  bool markers = true;
  bool hollow = false;  // markers without fill
  bool cross = false;   // markers are crosses
  double opacity = 1;
};

struct Chart {
  std::string title;
  std::string x_label;  // with unit
  std::string y_label;
  std::vector<Series> series;
  bool x_whole = false;  // ticks on whole numbers only
  bool x_from_zero = false;
  bool y_from_zero = false;
};

// "" when there is no finite point.
std::string ToSvg(const Chart& chart);

// Ticks at multiples of 1, 2 or 5 times a power of ten that cover [low, high], about `count` of them.
std::vector<double> RoundTicks(double low, double high, int count, bool whole);

// Colours that people with any colour vision can tell apart (Okabe and Ito 2008).
const std::string& SeriesColor(size_t index);

}  // namespace refinery::report

#include "server/report/chart.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <regex>

#include "server/report/charts.h"
#include "tests/server/report/support.h"

namespace refinery::report {
namespace {

using ::testing::DoubleNear;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::Pointwise;

TEST(RoundTicksTest, AreRoundAndCoverTheRange) {
  EXPECT_THAT(RoundTicks(0, 1, 5, false), Pointwise(DoubleNear(1e-12), {0.0, 0.2, 0.4, 0.6, 0.8, 1.0}));
  EXPECT_THAT(RoundTicks(0.31, 0.92, 6, false), Pointwise(DoubleNear(1e-12), {0.2, 0.4, 0.6, 0.8, 1.0}));
  EXPECT_THAT(RoundTicks(0, 3, 6, true), ElementsAre(0, 1, 2, 3));
  EXPECT_THAT(RoundTicks(5, 5, 6, true), ElementsAre(4, 5, 6));
  for (auto [low, high] : {std::pair{-3.2, 7.7}, {1e-9, 2e-9}, {1e6, 3e8}, {0.5, 0.5}, {0.0, 0.0}}) {
    const std::vector<double> ticks = RoundTicks(low, high, 6, false);
    EXPECT_GE(ticks.size(), 2u);
    EXPECT_LE(ticks.size(), 14u);
    EXPECT_LE(ticks.front(), low + 1e-15);
    EXPECT_GE(ticks.back(), high - 1e-15);
  }
}

Chart OneSeries(std::vector<ChartPoint> points) {
  return {.title = "T <1>",
          .x_label = "x & x",
          .y_label = "y",
          .series = {{.name = "a<b", .color = "#000000", .points = points, .line = true}}};
}

TEST(ChartTest, NothingFiniteIsNoPicture) {
  EXPECT_EQ(ToSvg(OneSeries({})), "");
  EXPECT_EQ(ToSvg(OneSeries({{.x = 1, .y = std::numeric_limits<double>::quiet_NaN()}})), "");
}

TEST(ChartTest, TextIsEscapedAndLabelled) {
  Chart chart = OneSeries({{.x = 0, .y = 0}, {.x = 1, .y = 1, .error = 0.1, .label = "<p>"}});
  chart.series.push_back(chart.series[0]);
  const std::string svg = ToSvg(chart);
  for (const char* text : {"T &lt;1&gt;", "x &amp; x", "a&lt;b", "&lt;p&gt;"}) EXPECT_THAT(svg, HasSubstr(text));
  EXPECT_THAT(svg, Not(HasSubstr("<p>")));
}

// Goal: labels of points at one place can be read.  Method: five labels there, at distances that 12-pixel letters need.
TEST(ChartTest, LabelsDoNotCoverEachOther) {
  std::vector<ChartPoint> points = {{.x = 0, .y = 0}, {.x = 2, .y = 1}};
  for (const char* name : {"first", "second", "third", "fourth", "fifth"}) points.push_back({.x = 1.5, .y = 0.5, .label = name});
  const std::string svg = ToSvg(OneSeries(points));
  std::vector<double> heights;
  for (const char* name : {"first", "second", "third", "fourth", "fifth"}) {
    std::smatch match;
    ASSERT_TRUE(std::regex_search(svg, match, std::regex("y=\"([0-9.]+)\" text-anchor=\"end\"[^>]*>" + std::string(name) + "<"))) << svg;
    heights.push_back(std::stod(match[1]));
  }
  std::sort(heights.begin(), heights.end());
  for (size_t i = 1; i < heights.size(); ++i) EXPECT_GE(heights[i] - heights[i - 1], 12) << i;
}

// Goal: points lie where their values say.  Method: the y of circles is linear in the value, and all lie inside the
// picture.
TEST(ChartTest, PointsAreLinearAndInside) {
  const std::string svg = ToSvg(OneSeries({{.x = 0, .y = 10}, {.x = 1, .y = 20}, {.x = 2, .y = 40}}));
  const std::regex circle("<circle cx=\"([0-9.]+)\" cy=\"([0-9.]+)\"");
  std::vector<double> x, y;
  for (std::sregex_iterator it(svg.begin(), svg.end(), circle), end; it != end; ++it) {
    x.push_back(std::stod((*it)[1]));
    y.push_back(std::stod((*it)[2]));
  }
  ASSERT_EQ(y.size(), 3u);
  EXPECT_NEAR((y[0] - y[2]) / (y[0] - y[1]), 3, 0.02);
  EXPECT_NEAR((x[2] - x[0]) / (x[1] - x[0]), 2, 0.02);
  for (double value : y) EXPECT_TRUE(value > 40 && value < 320);
}

TEST(ChartsTest, SearchShowsTheBestSoFarAndDivergedTrials) {
  const std::string svg = SearchChart(ExampleInput().job);
  for (const char* text :
       {"best so far", "muon, Sobol", "muon, model", "adamw, Sobol", "diverged", "validation loss [nats per token]"})
    EXPECT_THAT(svg, HasSubstr(text));
}

TEST(ChartsTest, QualityNamesVariantsAndUnits) {
  const std::string svg = QualityChart(ExampleInput().job, "model_bytes", 1e-6, "Size", "model size [MB]");
  for (const char* text : {"refined-gptq", "student-gptq", "best-adamw", "model size [MB]", "nats per token"})
    EXPECT_THAT(svg, HasSubstr(text));
  EXPECT_THAT(svg, Not(HasSubstr("best-muon"))) << "it is the refined model";
}

TEST(ChartsTest, ValidationNeedsMoreThanOnePoint) {
  ReportInput input = ExampleInput();
  EXPECT_THAT(ValidationChart(input.job, input.curves), HasSubstr("Validation loss"));
  for (auto& [path, curve] : input.curves) curve = "{\"step\":20,\"loss\":1,\"validation_loss\":1}\n";
  EXPECT_EQ(ValidationChart(input.job, input.curves), "");
  EXPECT_EQ(LossChart(input.job, {}), "");
}

}  // namespace
}  // namespace refinery::report

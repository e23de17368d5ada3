#include "server/report/chart.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "absl/strings/str_format.h"
#include "server/report/document.h"

namespace refinery::report {
namespace {

constexpr double kWidth = 560;
constexpr double kHeight = 360;
constexpr double kLeft = 68;
constexpr double kRight = 20;
constexpr double kTop = 44;
constexpr double kBottom = 50;
constexpr double kInset = 12;  // so that markers at the ends do not touch the frame
constexpr double kLabelGap = 9;      // between a marker and its label
constexpr double kLabelHeight = 14;
constexpr double kLetterWidth = 6.6;  // of the 12-pixel font, about
constexpr double kMarkerSpace = 4;
constexpr double kLegendRow = 18;
constexpr double kLegendColumn = 124;

std::string Number(double value) { return absl::StrFormat("%.6g", std::abs(value) < 1e-12 ? 0.0 : value); }

std::string At(double value) { return absl::StrFormat("%.1f", value); }

struct Range {
  double low = std::numeric_limits<double>::infinity();
  double high = -std::numeric_limits<double>::infinity();
  void Cover(double value) {
    if (!std::isfinite(value)) return;
    low = std::min(low, value);
    high = std::max(high, value);
  }
};

bool IsDrawable(const ChartPoint& point) { return std::isfinite(point.x) && std::isfinite(point.y); }

// The plane of a chart: data -> pixels.
class Plane {
 public:
  explicit Plane(const Chart& chart) {
    Range x, y;
    size_t names = 0;
    for (const Series& series : chart.series) {
      names += !series.name.empty();
      for (const ChartPoint& point : series.points) {
        if (!IsDrawable(point)) continue;
        x.Cover(point.x);
        y.Cover(point.y - point.error);
        y.Cover(point.y + point.error);
      }
    }
    empty_ = !(x.low <= x.high);
    if (empty_) return;
    if (chart.x_from_zero) x.Cover(0);
    if (chart.y_from_zero) y.Cover(0);
    x_ticks_ = RoundTicks(x.low, x.high, 6, chart.x_whole);
    y_ticks_ = RoundTicks(y.low, y.high, 6, false);
    per_row_ = std::max<size_t>(1, static_cast<size_t>((kWidth - kLeft - kRight) / kLegendColumn));
    legend_rows_ = names < 2 ? 0 : (names + per_row_ - 1) / per_row_;
  }

  bool empty() const { return empty_; }
  const std::vector<double>& x_ticks() const { return x_ticks_; }
  const std::vector<double>& y_ticks() const { return y_ticks_; }
  size_t legend_rows() const { return legend_rows_; }
  size_t per_row() const { return per_row_; }
  double top() const { return kTop + static_cast<double>(legend_rows_) * kLegendRow; }
  double bottom() const { return kHeight - kBottom; }
  double X(double x) const {
    const double share = (x - x_ticks_.front()) / (x_ticks_.back() - x_ticks_.front());
    return kLeft + kInset + share * (kWidth - kLeft - kRight - 2 * kInset);
  }
  double Y(double y) const {
    return bottom() - (y - y_ticks_.front()) / (y_ticks_.back() - y_ticks_.front()) * (bottom() - top());
  }

 private:
  bool empty_ = true;
  std::vector<double> x_ticks_, y_ticks_;
  size_t legend_rows_ = 0;
  size_t per_row_ = 1;
};

std::string Text(double x, double y, const char* anchor, const std::string& text, const char* more = "") {
  return "<text x=\"" + At(x) + "\" y=\"" + At(y) + "\" text-anchor=\"" + anchor + "\"" + more + ">" +
         EscapeHtml(text) + "</text>\n";
}

std::string Line(double x1, double y1, double x2, double y2, const std::string& color, double width = 1) {
  return "<line x1=\"" + At(x1) + "\" y1=\"" + At(y1) + "\" x2=\"" + At(x2) + "\" y2=\"" + At(y2) + "\" stroke=\"" +
         color + "\" stroke-width=\"" + Number(width) + "\"/>\n";
}

std::string Axes(const Chart& chart, const Plane& plane) {
  std::string svg = Text(16, 26, "start", chart.title, " font-size=\"15\" font-weight=\"600\" fill=\"#1f2933\"");
  for (double tick : plane.y_ticks()) {
    svg += Line(kLeft, plane.Y(tick), kWidth - kRight, plane.Y(tick), "#e8ecf1");
    svg += Text(kLeft - 8, plane.Y(tick) + 4, "end", Number(tick));
  }
  for (double tick : plane.x_ticks()) {
    svg += Line(plane.X(tick), plane.bottom(), plane.X(tick), plane.bottom() + 5, "#9aa5b1");
    svg += Text(plane.X(tick), plane.bottom() + 19, "middle", Number(tick));
  }
  svg += Line(kLeft, plane.bottom(), kWidth - kRight, plane.bottom(), "#9aa5b1");
  svg += Text((kLeft + kWidth - kRight) / 2, kHeight - 10, "middle", chart.x_label);
  const double middle = (plane.top() + plane.bottom()) / 2;
  return svg + Text(16, middle, "middle", chart.y_label, (" transform=\"rotate(-90 16 " + At(middle) + ")\"").c_str());
}

std::string Marker(const Series& series, double x, double y) {
  if (series.cross)
    return Line(x - 4, y - 4, x + 4, y + 4, series.color, 2) + Line(x - 4, y + 4, x + 4, y - 4, series.color, 2);
  return "<circle cx=\"" + At(x) + "\" cy=\"" + At(y) + "\" r=\"4\" stroke=\"" + series.color +
         "\" stroke-width=\"1.8\" fill=\"" + (series.hollow ? "#ffffff" : series.color) + "\"/>\n";
}

std::string DrawSeries(const Series& series, const Plane& plane) {
  std::string svg = "<g opacity=\"" + Number(series.opacity) + "\">\n";
  std::string path;
  double last_y = 0;
  for (const ChartPoint& point : series.points) {
    if (!IsDrawable(point)) continue;
    const double x = plane.X(point.x);
    const double y = plane.Y(point.y);
    if (path.empty()) {
      path = "M" + At(x) + " " + At(y);
    } else {
      if (series.steps) path += "L" + At(x) + " " + At(last_y);
      path += "L" + At(x) + " " + At(y);
    }
    last_y = y;
  }
  if (series.line && !path.empty())
    svg += "<path d=\"" + path + "\" fill=\"none\" stroke=\"" + series.color +
           "\" stroke-width=\"2\" stroke-linejoin=\"round\"" + (series.dashed ? " stroke-dasharray=\"6 4\"" : "") +
           "/>\n";
  for (const ChartPoint& point : series.points) {
    if (!IsDrawable(point)) continue;
    const double x = plane.X(point.x);
    const double y = plane.Y(point.y);
    if (point.error > 0) {
      const double high = plane.Y(point.y + point.error);
      const double low = plane.Y(point.y - point.error);
      svg += Line(x, low, x, high, series.color, 1.5) + Line(x - 4, low, x + 4, low, series.color, 1.5) +
             Line(x - 4, high, x + 4, high, series.color, 1.5);
    }
    if (series.markers) svg += Marker(series, x, y);
  }
  return svg + "</g>\n";
}

struct Box {
  double left = 0, top = 0, right = 0, bottom = 0;
  bool Meets(const Box& other) const {
    return left < other.right && other.left < right && top < other.bottom && other.top < bottom;
  }
};

// The labels of all points, each at the free place nearest to its marker: no two of them and no marker lie under another label. A
// label without any free place stands where it would stand alone.
std::string Labels(const Chart& chart, const Plane& plane) {
  std::vector<Box> taken;
  for (const Series& series : chart.series) {
    for (const ChartPoint& point : series.points) {
      if (!series.markers || !IsDrawable(point)) continue;
      const double x = plane.X(point.x), y = plane.Y(point.y);
      taken.push_back({x - kMarkerSpace, y - kMarkerSpace, x + kMarkerSpace, y + kMarkerSpace});
    }
  }
  std::string svg;
  for (const Series& series : chart.series) {
    for (const ChartPoint& point : series.points) {
      if (point.label.empty() || !IsDrawable(point)) continue;
      const double x = plane.X(point.x), y = plane.Y(point.y), width = kLetterWidth * static_cast<double>(point.label.size());
      const bool left = x > (kLeft + kWidth - kRight) / 2;  // towards the middle, so that it does not leave the picture
      const double start = left ? x - kLabelGap - width : x + kLabelGap;
      const auto at = [&](double row) { return Box{start, y - 18 + row * kLabelHeight, start + width, y - 18 + (row + 1) * kLabelHeight}; };
      double chosen = 0;
      for (const double row : {0, 1, -1, 2, -2, 3, -3, 4, -4, 5, -5}) {
        const Box box = at(row);
        if (box.top < plane.top() - kLabelHeight || box.bottom > plane.bottom()) continue;
        if (std::any_of(taken.begin(), taken.end(), [&](const Box& other) { return other.Meets(box); })) continue;
        chosen = row;
        break;
      }
      taken.push_back(at(chosen));
      svg += Text(left ? x - kLabelGap : x + kLabelGap, y - 7 + chosen * kLabelHeight, left ? "end" : "start", point.label,
                  " fill=\"#1f2933\"");
    }
  }
  return svg;
}

std::string Legend(const Chart& chart, const Plane& plane) {
  if (plane.legend_rows() == 0) return "";
  std::string svg;
  size_t index = 0;
  for (const Series& series : chart.series) {
    if (series.name.empty()) continue;
    const double x = kLeft + static_cast<double>(index % plane.per_row()) * kLegendColumn;
    const double y = kTop + static_cast<double>(index / plane.per_row()) * kLegendRow;
    svg += "<g opacity=\"" + Number(std::max(series.opacity, 0.8)) + "\">\n";
    if (series.line)
      svg += "<path d=\"M" + At(x) + " " + At(y) + "h18\" stroke=\"" + series.color + "\" stroke-width=\"2\"" +
             (series.dashed ? " stroke-dasharray=\"6 4\"" : "") + "/>\n";
    if (series.markers) svg += Marker(series, x + 9, y);
    svg += "</g>\n" + Text(x + 24, y + 4, "start", series.name);
    ++index;
  }
  return svg;
}

}  // namespace

std::vector<double> RoundTicks(double low, double high, int count, bool whole) {
  if (!(high > low)) {
    const double margin = whole ? 1 : std::max(std::abs(low) * 0.1, 1e-3);
    low -= margin;
    high += margin;
  }
  const double raw = (high - low) / count;
  const double power = std::pow(10, std::floor(std::log10(raw)));
  double step = power * 10;
  for (double factor : {5.0, 2.0, 1.0})
    if (power * factor >= raw * 0.999) step = power * factor;
  if (whole) step = std::max(1.0, std::ceil(step));
  std::vector<double> ticks;
  const double first = std::floor(low / step + 1e-9);
  const double last = std::ceil(high / step - 1e-9);
  for (double i = first; i <= last && ticks.size() < 100; ++i) ticks.push_back(i * step);
  if (ticks.size() < 2) ticks.push_back(ticks.back() + step);
  return ticks;
}

const std::string& SeriesColor(size_t index) {
  static const auto* const colors = new std::vector<std::string>{"#0072b2", "#d55e00", "#009e73", "#cc79a7",
                                                                 "#56b4e9", "#e69f00", "#5b5b5b", "#8a6d00"};
  return (*colors)[index % colors->size()];
}

std::string ToSvg(const Chart& chart) {
  const Plane plane(chart);
  if (plane.empty()) return "";
  std::string svg =
      "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 " + Number(kWidth) + " " + Number(kHeight) +
      "\" role=\"img\" font-family=\"system-ui, sans-serif\" font-size=\"12\" fill=\"#52606d\">\n<title>" +
      EscapeHtml(chart.title) + "</title>\n";
  svg += Axes(chart, plane);
  for (const Series& series : chart.series) svg += DrawSeries(series, plane);
  svg += Labels(chart, plane);
  return svg + Legend(chart, plane) + "</svg>";
}

}  // namespace refinery::report

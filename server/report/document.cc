#include "server/report/document.h"

#include <algorithm>

namespace refinery::report {
namespace {

constexpr char kStyle[] = R"(
:root { color-scheme: light; --ink: #1f2933; --soft: #616e7c; --line: #dde3ea; --band: #f5f7fa; --good: #0b7a53; --bad: #b3541e; }
* { box-sizing: border-box; }
body { margin: 0; background: #eef1f5; color: var(--ink); font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1120px; margin: 32px auto; padding: 36px 44px 48px; background: #fff; border: 1px solid var(--line); border-radius: 10px; }
h1 { margin: 0 0 2px; font-size: 26px; line-height: 1.25; }
h2 { margin: 36px 0 10px; font-size: 18px; }
p { margin: 8px 0; max-width: 78ch; }
.subtitle, .note { color: var(--soft); }
.callout { margin: 18px 0 6px; padding: 12px 16px; border-left: 4px solid var(--good); background: #effaf5; border-radius: 0 6px 6px 0; }
.callout.bad { border-color: var(--bad); background: #fdf4ee; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: 10px 0; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 14px 6px 0; text-align: left; border-bottom: 1px solid var(--line); white-space: nowrap; vertical-align: top; }
td.text { white-space: normal; min-width: 16em; max-width: 46em; }
th { color: var(--soft); font-weight: 600; border-bottom: 2px solid var(--line); }
th.r, td.r { text-align: right; }
tr.strong td { font-weight: 650; background: #effaf5; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(460px, 1fr)); gap: 18px; margin: 10px 0; }
.figures svg { width: 100%; height: auto; border: 1px solid var(--line); border-radius: 8px; background: #fff; }
pre { overflow-x: auto; padding: 14px 16px; background: var(--band); border: 1px solid var(--line); border-radius: 8px;
      font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
details { margin: 10px 0; } summary { cursor: pointer; color: var(--soft); }
@media print { body { background: #fff; } main { border: 0; margin: 0; padding: 0; max-width: none; } }
@media (max-width: 640px) { main { padding: 20px 16px; margin: 0; border: 0; } .figures { grid-template-columns: 1fr; } }
)";

size_t Width(const std::string& text) {
  return static_cast<size_t>(std::count_if(text.begin(), text.end(), [](char c) { return (c & 0xc0) != 0x80; }));
}

bool IsRight(const Table& table, size_t column) { return column < table.right.size() && table.right[column]; }

std::string OneLine(std::string text) {
  std::replace_if(
      text.begin(), text.end(), [](char c) { return c == '\n' || c == '\r' || c == '\t'; }, ' ');
  return text;
}

std::string HtmlRow(const Table& table, const std::vector<std::string>& cells, const char* tag) {
  std::string html;
  for (size_t i = 0; i < cells.size(); ++i) {
    const char* kind = IsRight(table, i) ? " class=\"r\"" : Width(cells[i]) > 48 ? " class=\"text\"" : "";
    html += std::string("<") + tag + kind + ">" + EscapeHtml(cells[i]) + "</" + tag + ">";
  }
  return html;
}

std::string HtmlTable(const Table& table) {
  std::string html =
      "<div class=\"scroll\"><table>\n<thead><tr>" + HtmlRow(table, table.header, "th") + "</tr></thead>\n<tbody>\n";
  for (size_t i = 0; i < table.rows.size(); ++i) {
    const bool strong = static_cast<int>(i) == table.strong_row;
    html += (strong ? "<tr class=\"strong\">" : "<tr>") + HtmlRow(table, table.rows[i], "td") + "</tr>\n";
  }
  return html + "</tbody></table></div>\n";
}

std::string MarkdownTable(const Table& table) {
  std::string text = "|";
  for (const std::string& cell : table.header) text += " " + EscapeMarkdown(cell) + " |";
  text += "\n|";
  for (size_t i = 0; i < table.header.size(); ++i) text += IsRight(table, i) ? " ---: |" : " --- |";
  text += "\n";
  for (size_t i = 0; i < table.rows.size(); ++i) {
    const char* mark = static_cast<int>(i) == table.strong_row ? "**" : "";
    text += "|";
    for (const std::string& cell : table.rows[i])
      text += cell.empty() ? "  |" : std::string(" ") + mark + EscapeMarkdown(cell) + mark + " |";
    text += "\n";
  }
  return text + "\n";
}

// A fence longer than any run of backticks in the text.
std::string Fence(const std::string& text) {
  size_t longest = 2;
  size_t run = 0;
  for (char c : text) longest = std::max(longest, run = c == '`' ? run + 1 : 0);
  return std::string(longest + 1, '`');
}

}  // namespace

std::string EscapeHtml(const std::string& text) {
  std::string out;
  for (char c : text) {
    switch (c) {
      case '&': out += "&amp;"; break;
      case '<': out += "&lt;"; break;
      case '>': out += "&gt;"; break;
      case '"': out += "&quot;"; break;
      case '\'': out += "&#39;"; break;
      default:
        // Control characters have no place in HTML or SVG.
        if (static_cast<unsigned char>(c) >= 0x20 || c == '\n' || c == '\t') out += c;
    }
  }
  return out;
}

std::string EscapeMarkdown(const std::string& text) {
  static constexpr std::string_view kSpecial = "\\`*_[]|#~";
  std::string out;
  for (char c : OneLine(text)) {
    if (c == '<') {
      out += "&lt;";
    } else if (c == '&') {
      out += "&amp;";
    } else {
      if (kSpecial.find(c) != std::string_view::npos) out += '\\';
      out += c;
    }
  }
  return out;
}

std::string ToMarkdown(const Document& document) {
  std::string text = "# " + EscapeMarkdown(document.title) + "\n\n" + EscapeMarkdown(document.subtitle) + "\n\n";
  for (const Block& block : document.blocks) {
    switch (block.kind) {
      case Block::Kind::kHeading: text += "## " + EscapeMarkdown(block.text) + "\n\n"; break;
      case Block::Kind::kParagraph: text += EscapeMarkdown(block.text) + "\n\n"; break;
      case Block::Kind::kCallout: text += "> " + EscapeMarkdown(block.text) + "\n\n"; break;
      case Block::Kind::kTable: text += MarkdownTable(block.table); break;
      case Block::Kind::kFolded: text += EscapeMarkdown(block.text) + "\n\n" + MarkdownTable(block.table); break;
      case Block::Kind::kFigures: text += "(Plots: see report.html.)\n\n"; break;
      case Block::Kind::kCode: {
        const std::string fence = Fence(block.text);
        text += fence + "\n" + block.text + (block.text.ends_with('\n') ? "" : "\n") + fence + "\n\n";
        break;
      }
    }
  }
  return text;
}

std::string ToHtml(const Document& document) {
  std::string html =
      "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n"
      "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>" +
      EscapeHtml(document.title) + "</title>\n<style>" + kStyle + "</style>\n</head>\n<body>\n<main>\n<h1>" +
      EscapeHtml(document.title) + "</h1>\n<p class=\"subtitle\">" + EscapeHtml(document.subtitle) + "</p>\n";
  for (const Block& block : document.blocks) {
    switch (block.kind) {
      case Block::Kind::kHeading: html += "<h2>" + EscapeHtml(block.text) + "</h2>\n"; break;
      case Block::Kind::kParagraph: html += "<p>" + EscapeHtml(block.text) + "</p>\n"; break;
      case Block::Kind::kCallout:
        html += std::string("<div class=\"callout") + (block.good ? "" : " bad") + "\">" + EscapeHtml(block.text) +
                "</div>\n";
        break;
      case Block::Kind::kTable: html += HtmlTable(block.table); break;
      case Block::Kind::kFolded:
        html +=
            "<details><summary>" + EscapeHtml(block.text) + "</summary>\n" + HtmlTable(block.table) + "</details>\n";
        break;
      case Block::Kind::kFigures:
        html += "<div class=\"figures\">\n";
        for (const std::string& svg : block.figures) html += svg + "\n";
        html += "</div>\n";
        break;
      case Block::Kind::kCode: html += "<pre>" + EscapeHtml(block.text) + "</pre>\n"; break;
    }
  }
  return html + "</main>\n</body>\n</html>\n";
}

std::string ToText(const Table& table) {
  std::vector<std::vector<std::string>> lines = {table.header};
  lines.insert(lines.end(), table.rows.begin(), table.rows.end());
  std::vector<size_t> widths(table.header.size());
  for (const auto& line : lines)
    for (size_t i = 0; i < line.size() && i < widths.size(); ++i) widths[i] = std::max(widths[i], Width(line[i]));
  std::string text;
  for (const auto& line : lines) {
    std::string row;
    for (size_t i = 0; i < line.size() && i < widths.size(); ++i) {
      const std::string space(widths[i] - Width(line[i]), ' ');
      row += (i == 0 ? "" : "  ") + (IsRight(table, i) ? space + OneLine(line[i]) : OneLine(line[i]) + space);
    }
    row.erase(row.find_last_not_of(' ') + 1);
    text += row + "\n";
  }
  return text;
}

}  // namespace refinery::report

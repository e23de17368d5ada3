// server/report/document.h
//
// A report as a list of blocks, and its two renderings: Markdown and self-contained HTML. All text is escaped here and
// nowhere else; blocks hold plain UTF-8.

#pragma once

#include <string>
#include <vector>

namespace refinery::report {

struct Table {
  std::vector<std::string> header;
  std::vector<std::vector<std::string>> rows;
  std::vector<bool> right;  // columns that hold numbers; missing entries are left-aligned
  int strong_row = -1;      // one row that stands out
};

struct Block {
  enum class Kind { kHeading, kParagraph, kCallout, kTable, kFigures, kCode, kFolded };
  Kind kind = Kind::kParagraph;
  std::string text;  // of a folded table: its summary line
  bool good = true;  // of a callout: its colour
  Table table;
  std::vector<std::string> figures;  // SVG, trusted
};

struct Document {
  std::string title;
  std::string subtitle;
  std::vector<Block> blocks;

  void Heading(std::string text) { blocks.push_back({.kind = Block::Kind::kHeading, .text = std::move(text)}); }
  void Paragraph(std::string text) { blocks.push_back({.kind = Block::Kind::kParagraph, .text = std::move(text)}); }
  void Callout(std::string text, bool good) {
    blocks.push_back({.kind = Block::Kind::kCallout, .text = std::move(text), .good = good});
  }
  void Add(Table table) { blocks.push_back({.kind = Block::Kind::kTable, .table = std::move(table)}); }
  // A long table that HTML shows behind `summary`.
  void Fold(std::string summary, Table table) {
    blocks.push_back({.kind = Block::Kind::kFolded, .text = std::move(summary), .table = std::move(table)});
  }
  void Figures(std::vector<std::string> svgs) {
    blocks.push_back({.kind = Block::Kind::kFigures, .figures = std::move(svgs)});
  }
  void Code(std::string text) { blocks.push_back({.kind = Block::Kind::kCode, .text = std::move(text)}); }
};

// Figures are left out; the reader is pointed to report.html.
std::string ToMarkdown(const Document& document);
// One file without scripts, links or fonts from elsewhere.
std::string ToHtml(const Document& document);
// Aligned columns for a terminal.
std::string ToText(const Table& table);

std::string EscapeHtml(const std::string& text);
std::string EscapeMarkdown(const std::string& text);

}  // namespace refinery::report

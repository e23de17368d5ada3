#include "server/report/document.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace refinery::report {
namespace {

using ::testing::HasSubstr;

Document Example() {
  Document document{.title = "A & B", .subtitle = "s"};
  document.Heading("H");
  document.Paragraph("one_two *three*");
  document.Callout("<c>", false);
  document.Add(
      {.header = {"name", "n"}, .rows = {{"a|b", "1"}, {"c\nd", "22"}}, .right = {false, true}, .strong_row = 0});
  document.Fold("more", {.header = {"x"}, .rows = {{"y"}}});
  document.Figures({"<svg></svg>"});
  document.Code("a ```` b\n");
  return document;
}

TEST(DocumentTest, Markdown) {
  EXPECT_EQ(ToMarkdown(Example()),
            "# A &amp; B\n\ns\n\n## H\n\none\\_two \\*three\\*\n\n> &lt;c>\n\n"
            "| name | n |\n| --- | ---: |\n| **a\\|b** | **1** |\n| c d | 22 |\n\n"
            "more\n\n| x |\n| --- |\n| y |\n\n(Plots: see report.html.)\n\n`````\na ```` b\n`````\n\n");
}

TEST(DocumentTest, Html) {
  const std::string html = ToHtml(Example());
  for (const char* part : {"<title>A &amp; B</title>", "<h2>H</h2>", "<div class=\"callout bad\">&lt;c&gt;</div>",
                           "<tr class=\"strong\"><td>a|b</td><td class=\"r\">1</td></tr>",
                           "<details><summary>more</summary>", "<svg></svg>", "<pre>a ```` b\n</pre>"})
    EXPECT_THAT(html, HasSubstr(part));
}

TEST(DocumentTest, TextCountsCharactersNotBytes) {
  EXPECT_EQ(ToText({.header = {"a", "value"}, .rows = {{"é", "1 ± 2"}, {"bcd", "3"}}, .right = {false, true}}),
            "a    value\né    1 ± 2\nbcd      3\n");
}

TEST(DocumentTest, ControlCharactersVanishFromHtml) {
  EXPECT_EQ(EscapeHtml(std::string("a\0\x1b[31m\"'", 9)), "a[31m&quot;&#39;");
}

}  // namespace
}  // namespace refinery::report

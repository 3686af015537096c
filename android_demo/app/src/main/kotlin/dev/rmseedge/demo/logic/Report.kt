package dev.rmseedge.demo.logic

/** What came of a check: [detail] says what was found. */
class Check(val name: String, val verdict: Verdict, val detail: String)

/** Whether something is as it should be. */
enum class Verdict(val word: String) { OK("ok"), FAILED("**FAILED**"), SKIPPED("skipped") }

/** Facts and checks as Markdown, to be attached to an issue. */
fun report(facts: Map<String, String>, checks: List<Check>): String = buildString {
    appendLine("# rmse-edge on Android")
    appendLine()
    appendLine("| check | verdict | |")
    appendLine("| --- | --- | --- |")
    for (check in checks) appendLine("| ${cell(check.name)} | ${check.verdict.word} | ${cell(check.detail)} |")
    appendLine()
    for ((name, value) in facts) appendLine("- $name: ${value.lines().joinToString(" ")}")
}

private fun cell(text: String) = text.lines().joinToString(" ").replace("|", "\\|")

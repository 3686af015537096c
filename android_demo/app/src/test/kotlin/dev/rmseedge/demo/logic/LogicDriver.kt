package dev.rmseedge.demo.logic

import dev.rmseedge.core.json.Fields
import dev.rmseedge.core.json.Json
import dev.rmseedge.core.json.items
import dev.rmseedge.core.json.long
import dev.rmseedge.core.json.number
import dev.rmseedge.core.json.text
import dev.rmseedge.core.json.whole
import dev.rmseedge.core.pack.LoopPackage
import dev.rmseedge.core.text.Span
import dev.rmseedge.core.text.TextSession
import java.io.File

// What of the app needs no Android, as tests drive it: one JSON document per line of stdin, one per line of stdout.

fun main() {
    println(Json.write(mapOf("ready" to true)))
    for (line in generateSequence(::readlnOrNull)) println(Json.write(answer(Fields(Json.parse(line)))))
}

private fun answer(asked: Fields): Any? = when (val what = asked.at("do", text)) {
    "cores" -> cores(CpuCores(asked.at("kHz", items(long(0L..Long.MAX_VALUE)))))

    "cores in" -> cores(CpuCores.read(File(asked.at("folder", text)), asked.at("count", whole(1..64))))

    "memory" -> MemoryForecast(asked.at("needed", bytes), asked.at("free", bytes), asked.at("reserve", bytes)).fits

    "guard" -> guard(asked.at("steps", items(text)))

    "dial" -> dial(asked)

    "scale" -> scale(asked)

    "names" -> asked.at("files", items(text)).map(::modelName)

    "unused" -> unusedName(asked.at("name", text), asked.at("taken", items(text)))

    "series" -> LoopSeries(asked.at("room", whole(1..99))).apply { asked.at("depths", items(whole(1..99))).forEach(::add) }.values

    "transcript" -> transcript(asked)

    "states" -> File(asked.at("folder", text)).let { folder ->
        val dropped = dropOldStates(folder.listFiles()!!.toList(), File(folder, asked.at("current", text)), asked.at("most", bytes))
        mapOf("dropped" to dropped, "left" to folder.list()!!.sorted())
    }

    "check" -> checks(asked)

    else -> error("no command $what")
}

private val bytes = long(0L..Long.MAX_VALUE)

private fun cores(found: CpuCores) = mapOf("threads" to found.threads, "text" to "$found", "count" to found.frequencies.size)

/** Loads are tried, end well, fail, or end the app; what a new start would find. */
private fun guard(steps: List<String>): Map<String, String?> {
    val kept = mutableMapOf<String, String>()
    val notes = object : Notes {
        override fun get(name: String) = kept[name]

        override fun commit(changes: Map<String, String?>) {
            for ((name, value) in changes) if (value == null) kept -= name else kept[name] = value
        }
    }
    for (step in steps) {
        val (what, model) = step.split(':', limit = 2)
        val settings = LoadSettings(model, threads = 4)
        val guard = LoadGuard(notes)
        when (what) {
            "try" -> guard.before(settings)
            "succeed" -> guard.succeeded(settings)
            "fail" -> guard.failed()
        }
    }
    val next = LoadGuard(notes)
    return mapOf("broken" to next.broken?.model, "worked" to next.worked?.model, "at start" to next.atStart?.model)
}

private fun dial(asked: Fields): Map<String, Any> {
    val scale = DialScale.of(asked.at("name", text), asked.at("loops", whole(1..64)))
    val values = (0..scale.steps).map(scale::value)
    return mapOf("values" to values, "steps" to values.map(scale::step), "nearest" to scale.step(asked.at("value", number)))
}

private fun scale(asked: Fields): Map<String, Any> {
    val scale = DepthScale(asked.at("loops", whole(1..64)), dark = asked.at("dark", whole(0..1)) == 1)
    val depths = 1..scale.loops
    return mapOf(
        "background" to depths.map(scale::background),
        "bar" to depths.map(scale::bar),
        "underline" to depths.map(scale::underline),
        "digits" to depths.map(scale::digits),
    )
}

private fun transcript(asked: Fields): Map<String, Any> {
    val written = Transcript("m")
    val texts = asked.at("texts", items(text))
    asked.at("depths", items(whole(0..64))).forEachIndexed { i, depth -> written.add(Span(texts[i], depth)) }
    val read = Transcript.ofJson(written.toJson())
    return mapOf(
        "text" to read.text(),
        "depths" to read.from(0).map { it.depth },
        "rest" to read.from(1).size,
        "model" to read.model,
        "title" to read.title,
    )
}

/** The checklist on a package, as the app runs it. */
private fun checks(asked: Fields): Map<String, String> {
    val pack = LoopPackage.open(File(asked.at("package", text)))
    val reference = Reference.ofJson(Json.readText(File(asked.at("reference", text))))
    TextSession.open(pack, threads = 1).use { session ->
        val list = Checklist(session, File(asked.at("scratch", text)))
        val found = listOf(list.text(reference), list.sessions(pack.sample.orEmpty().take(10)))
        return found.associate { it.name to it.verdict.name } + ("report" to report(mapOf("device" to "a test"), found))
    }
}

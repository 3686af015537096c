package dev.rmseedge.core

import dev.rmseedge.core.host.LoopRuntime
import dev.rmseedge.core.host.SplitMix64
import dev.rmseedge.core.host.noise
import dev.rmseedge.core.host.openRuntime
import dev.rmseedge.core.json.Json
import dev.rmseedge.core.measure.Bench
import dev.rmseedge.core.measure.BenchSettings
import dev.rmseedge.core.measure.ProcessMemory
import dev.rmseedge.core.measure.benchReport
import dev.rmseedge.core.model.Dials
import dev.rmseedge.core.pack.Archive
import dev.rmseedge.core.pack.LoopPackage
import dev.rmseedge.core.session.SessionFile
import dev.rmseedge.core.session.SessionText
import dev.rmseedge.core.text.Conversation
import dev.rmseedge.core.text.GenerationControl
import dev.rmseedge.core.text.GenerationSettings
import dev.rmseedge.core.text.Sampler
import dev.rmseedge.core.text.Sampling
import dev.rmseedge.core.text.TextSession
import dev.rmseedge.core.text.Tokenizer
import java.io.File
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.util.Base64

// The core as tests drive it: one JSON document per line of stdin, one per line of stdout; {"error": ...} of what a user can mend.

fun main(arguments: Array<String>) {
    when (arguments.firstOrNull()) {
        null -> serve { asked -> answer((asked as List<*>).map { it as String }) }

        else -> opened(arguments[0], arguments.getOrNull(1)) {
            Server(it).let { server -> serve { asked -> server.answer(asked as Map<*, *>) } }
        }
    }
}

private fun serve(answer: (Any?) -> Any?) {
    println(Json.write(mapOf("ready" to true)))
    for (line in generateSequence(::readlnOrNull)) {
        val said = try {
            answer(Json.parse(line))
        } catch (error: UserException) {
            mapOf("error" to error.message)
        }
        println(Json.write(said))
    }
}

/** What one command with its arguments gives. */
private fun answer(words: List<String>): Any? {
    val rest = words.drop(1)
    return when (words[0]) {
        "open" -> described(LoopPackage.open(File(rest[0])))

        "load" -> TextSession.open(LoopPackage.open(File(rest[0])), threads = 1).use { it.runtime.stateBytes }

        "run" -> opened(rest[0], rest.getOrNull(1)) { it.runtime.stateBytes }

        // without a tokenizer, too
        "unpack" -> described(unpack(rest[0], rest[1], rest[2], rest.getOrNull(3)))

        "numbers" -> numbers(Json.read(File(rest[0])) as Map<*, *>)

        "tokens" -> Tokenizer.open(File(rest[0])).let { all -> rest.drop(1).map { all.encode(it).toList() } }

        "more tokens" -> Tokenizer.open(File(rest[0])).let { all -> rest.drop(1).map { all.encodeMore(it).toList() } }

        "texts" -> Tokenizer.open(File(rest[0])).let { all -> rest.drop(1).map { ids -> all.decode(ids.split(' ').map(String::toInt)) } }

        "memory" -> memory(rest[0])

        "bench" -> opened(rest[0]) { bench(it, rest[1].toInt()) }

        else -> error("no command ${words[0]}")
    }
}

/** A package and its model at work, which is closed afterwards. */
private class Opened(val pack: LoopPackage, val runtime: LoopRuntime)

private fun <T> opened(folder: String, expertMemory: String? = null, work: (Opened) -> T): T {
    val pack = LoopPackage.open(File(folder))
    return openRuntime(pack, threads = 1, expertMemory).use { work(Opened(pack, it)) }
}

private fun described(pack: LoopPackage) = mapOf(
    "folder" to pack.folder.path,
    "name" to pack.info.name,
    "engine" to pack.target.engine,
    "nbytes" to pack.nbytes,
    "rules" to pack.info.rules,
    "predicted_bytes" to pack.predictedBytes(),
    "expert_bytes" to pack.expertBytes,
    "longest" to pack.info.longest,
    "window" to pack.info.window,
)

/** Of a stream where `room` is given, as a file picker has it; of a file otherwise. */
private fun unpack(archive: String, parent: String, name: String, room: String?): LoopPackage {
    Archive.tidy(File(parent)) // as an app does when it starts
    return when (room) {
        null -> Archive.unpack(File(archive), File(parent), name)
        else -> Archive.unpack(File(archive).inputStream(), File(parent), name, label = archive, room = room.toLong())
    }
}

/** Resident bytes without the model, and with it at work: through calls of every size. */
private fun memory(folder: String): List<Long> {
    val before = ProcessMemory.now()!!.resident
    return opened(folder) { opened ->
        opened.runtime.feed(IntArray(70))
        listOf(before, ProcessMemory.now()!!.resident)
    }
}

/** What tests/data/sampler.json has the results of. */
private fun numbers(known: Map<*, *>): Map<String, Any> = mapOf(
    "words" to of(known, "words").map { case ->
        SplitMix64(seed(case)).let { random -> List((case["words"] as List<*>).size) { random.next().toString(16).padStart(16, '0') } }
    },
    "uniform" to of(known, "uniform").map { case ->
        SplitMix64(seed(case)).let { random -> List((case["numbers"] as List<*>).size) { random.uniform() } }
    },
    "noise" to of(known, "noise").map { case ->
        noise(seed(case), (case["position"] as String).toULong(), (case["numbers"] as List<*>).size).map(Float::toDouble)
    },
    "tokens" to of(known, "tokens").map { case ->
        val sampler = Sampler(sampling(case["options"] as Map<*, *>))
        val unused = (case["unused"] as List<*>).map { ends -> (ends as List<*>).map { (it as Long).toInt() }.let { it[0] until it[1] } }
        List((case["tokens"] as List<*>).size) { sampler.pick(logits(case["logits"] as Map<*, *>), unused) }
    },
)

private fun of(known: Map<*, *>, part: String) = (known[part] as List<*>).map { it as Map<*, *> }

private fun seed(case: Map<*, *>) = (case["seed"] as String).toULong()

private fun logits(from: Map<*, *>): FloatArray {
    (from["list"] as List<*>?)?.let { list -> return list.map { (it as Number).toFloat() }.toFloatArray() }
    val (seed, position, count) = (from["noise"] as List<*>).map { it as Long }
    val times = (from["times"] as Number).toFloat()
    return noise(seed.toULong(), position.toULong(), count.toInt()).map { it * times }.toFloatArray()
}

private fun sampling(options: Map<*, *>): Sampling {
    fun number(name: String, default: Number) = options[name] as Number? ?: default
    return Sampling(
        number("temperature", 0.8).toDouble(),
        number("top_k", 0).toInt(),
        number("top_p", 1.0).toDouble(),
        (options["seed"] as String? ?: "0").toULong(),
    )
}

private fun bench(opened: Opened, repetitions: Int): Map<String, Any?> {
    val runtime = opened.runtime
    val ids = opened.pack.tokenizer().encode(opened.pack.sample!!)
    val settings = BenchSettings(prompt = 70, generate = 20, adaptive = runtime.info.dials, repetitions = repetitions)
    val bench = Bench(runtime, ids, settings.fitting(runtime.info.longest))
    check(bench.run())
    return benchReport(bench, runtime)
}

private class Server(opened: Opened) {
    private val runtime = opened.runtime
    private val pack = opened.pack

    // Made when a text is asked for: the models of some tests have no tokenizer.
    private val session by lazy { TextSession(runtime, pack.tokenizer()) }

    private val conversation by lazy { Conversation(session, pack.turns ?: throw UserException("unread: ${pack.hasUnreadTemplate}")) }

    fun answer(asked: Map<*, *>): Map<String, Any?> {
        val path by lazy { File(asked["path"] as String) }
        when (asked["do"]) {
            "reset" -> runtime.reset()
            "new text" -> session.reset()
            "feed" -> return feed(asked)
            "save" -> SessionFile.save(runtime, path, SessionText(chat = asked["chat"] as String))
            "restore" -> SessionFile.restore(runtime, path)
            "generate" -> return generate(asked)
            "talk" -> return talk(asked)
            "save talk" -> conversation.save(path)
            "restore talk" -> return mapOf("talk" to conversation.restore(path))
            "save text" -> session.save(path)
            "restore text" -> session.restore(path)
            else -> error("what is ${asked["do"]}")
        }
        val experts = runtime.experts?.let { mapOf("total" to it.total, "budget" to it.budget, "hit_rate" to it.hitRate) }
        return mapOf("position" to runtime.position, "state_bytes" to runtime.stateBytes, "experts" to experts)
    }

    private fun feed(asked: Map<*, *>): Map<String, Any?> {
        val tokens = (asked["tokens"] as List<*>).map { (it as Long).toInt() }.toIntArray()
        var calls = asked["calls"] as Long? ?: Long.MAX_VALUE // then reading is stopped
        val fed = runtime.feed(tokens, dials(asked), asked["logits"] == "all", (asked["prefix"] as Long).toInt()) { --calls > 0 }
        val bytes = ByteBuffer.allocate(4 * fed.logits.size).order(ByteOrder.LITTLE_ENDIAN)
        fed.logits.forEach(bytes::putFloat)
        return mapOf(
            "logits" to Base64.getEncoder().encodeToString(bytes.array()),
            "depth" to fed.depth.toList(),
            "iterations" to fed.iterations.toList(),
            "surprises" to fed.surprises.map { (position, value) -> listOf(position, value) },
            "position" to runtime.position,
        )
    }

    private fun generate(asked: Map<*, *>): Map<String, Any?> {
        val settings = GenerationSettings(
            (asked["count"] as Long).toInt(),
            sampling(asked["options"] as Map<*, *>),
            (asked["stop"] as List<*>).map { it as String },
        )
        val control = GenerationControl(dials(asked))
        val spans = mutableListOf<List<Any>>()
        val shallow = asked["shallow after"] as Long? // from this token on one loop, as a slider says it
        val until = asked["stop after"] as Long?
        val found = session.generate(asked["prompt"] as String, settings, control) { event ->
            event.spans.mapTo(spans) { listOf(it.text, it.depth) }
            if (event.index + 1L == shallow) control.dials = runtime.info.dialsWith(mapOf("max_loops" to 1.0))
            if (event.index + 1L == until) control.stop()
        }
        val rest = found.rest.map { listOf(it.text, it.depth) }
        return found.toMap() + mapOf("tokens" to found.tokens.toList(), "depth" to found.depth.toList(), "spans" to spans + rest)
    }

    private fun talk(asked: Map<*, *>): Map<String, Any?> {
        val settings = GenerationSettings((asked["count"] as Long).toInt(), sampling(asked["options"] as Map<*, *>))
        val found = conversation.ask(asked["question"] as String, settings) {}
        return found.toMap() + mapOf("tokens" to found.tokens.toList(), "answer" to conversation.messages.last().content)
    }

    private fun dials(asked: Map<*, *>): Dials {
        val changes = asked["dials"] as Map<*, *>
        return runtime.info.dialsWith(changes.entries.associate { (name, value) -> name as String to (value as Number).toDouble() })
    }
}

package dev.rmseedge.core.model

import dev.rmseedge.core.ArgumentException
import dev.rmseedge.core.json.Fields
import dev.rmseedge.core.json.Reader
import dev.rmseedge.core.json.fields
import dev.rmseedge.core.json.flag
import dev.rmseedge.core.json.items
import dev.rmseedge.core.json.long
import dev.rmseedge.core.json.members
import dev.rmseedge.core.json.name
import dev.rmseedge.core.json.number
import dev.rmseedge.core.json.oneOf
import dev.rmseedge.core.json.positive
import dev.rmseedge.core.json.refuseField
import dev.rmseedge.core.json.whole
import dev.rmseedge.core.json.text as anyText

// What a manifest may ask for at most: one with more is not to be believed, and nothing is allocated by it.
private const val MOST_LOOPS = 64
private const val MOST_AXES = 8
private const val LARGEST_VOCABULARY = 1 shl 22
private const val MANY = 1L shl 53

private val count = whole(1..(1 shl 16))
private val some = whole(0..(1 shl 16))
private val many = long(0..MANY)
private val token = whole(0 until LARGEST_VOCABULARY)
private val dtype = oneOf(Dtype.BY_LABEL)
private val kind = oneOf(StateKind.entries.associateBy { it.label })
private val reader = oneOf(listOf("prelude", "loop", "coda", "commit").associateWith { it })
private val sizes = items(whole(1..Int.MAX_VALUE))

private val shape = Reader { value, path ->
    val shape = sizes.read(value, path)
    // The product of more could overflow before it is compared with anything.
    val fits = shape.size <= MOST_AXES && shape.fold(1.0) { product, size -> product * size } <= ModelInfo.LARGEST_STATE
    if (fits) shape else refuseField(path, shape, "the shape of a tensor that fits")
}

private val tensor = Reader { value, path ->
    val part = fields.read(value, path)
    val shape = part.at("shape", shape)
    val axis = part.orNull("slots_axis", whole(0..MOST_AXES))
    if (axis != null && axis >= shape.size) part.refuse("slots_axis", axis, "one of its axes")
    TensorSpec(part.at("name", name), part.at("dtype", dtype), shape, axis)
}

private val method = Reader { value, path ->
    fields.read(value, path).let { MethodSpec(it.at("inputs", items(tensor)), it.at("outputs", items(tensor))) }
}

private val range = Reader { value, path ->
    val ends = items(whole(0..LARGEST_VOCABULARY)).read(value, path)
    if (ends.size != 2 || ends[0] >= ends[1]) refuseField(path, ends, "the first id of a range and that behind it")
    ends[0] until ends[1]
}

/** What every METHOD_ROWS takes and gives, by the manifest; a `JsonException` names the field that does not fit. */
internal fun readMethods(manifest: Fields): Map<String, MethodSpec> = manifest.at("methods", members(method))

/** What the manifest says about the model: typed, bounded, of one piece; a `JsonException` names the field that does not fit. */
internal fun readModel(manifest: Fields, nbytes: Long): ModelInfo {
    val model = manifest.at("model", fields)
    val config = model.orNull("config", fields)
    val deepest = model.at("max_loops", whole(1..MOST_LOOPS))
    val untrained = config?.orNull("untrained_loops", whole(0..MOST_LOOPS))
    val segment = model.orNull("segment", count)
    val page = model.orNull("page", count)
    val methods = model.at("methods", items(name)).toSet()
    if ("text" !in model) {
        val other = if ("board" in model) {
            "a board"
        } else if ("blocks" in model) {
            "blocks"
        } else {
            "nothing"
        }
        model.refuse("text", other, "a model of texts token by token, as this app runs")
    }
    if ("plan" in model) model.refuse("plan", "one of layers", "a model whose iterations are alike, as this app runs")
    val text = textInfo(model.at("text", fields))
    val info = ModelInfo(
        name = model.at("name", anyText),
        target = model.at("target", name),
        quant = model.or("fp32", "quant", name),
        fingerprint = model.or("", "fingerprint", anyText),
        maxLoops = deepest,
        untrainedLoops = untrained,
        dials = ownDials(model, deepest, untrained),
        rules = model.at("rules", items(name)),
        width = model.at("width", count),
        parameters = model.at("parameters", many),
        nbytes = nbytes,
        chunks = callRows(model, segment),
        segment = segment,
        methods = methods,
        page = page,
        state = model.at("state", fields).let { all ->
            all.names.associateWith { state(it, all.at(it, fields), deepest, segment, page, methods) }
        },
        noise = model.or(emptyMap(), "noise", members(positive)),
        text = text,
        hitRows = model.orNull("retrieval", fields)?.let { it.at("slots", whole(1..4096)) * it.at("hits", whole(1..4096)) } ?: 0,
        loopWeights = model.or(0L, "loop_weights", many),
        onceWeights = model.or(0L, "once_weights", many),
        bosTokenId = config?.orNull("bos_token_id", whole(0 until text.vocabSize)),
    )
    checkState(model, info)
    val said = manifest.at("target", name)
    if (info.target != said) model.refuse("target", info.target, "$said, as target says")
    val weights = manifest.at("quantization", fields).at("weights", name)
    if (info.quant != weights) model.refuse("quant", info.quant, "$weights, as quantization.weights says")
    return info
}

private fun textInfo(part: Fields): TextInfo {
    val text = TextInfo(
        vocabSize = part.at("vocab_size", whole(1..LARGEST_VOCABULARY)),
        rotaryDims = part.or(0, "rotary_dims", some),
        ropeTheta = part.or(10_000.0, "rope_theta", positive),
        furtherThetas = part.or(emptyMap(), "further_thetas", members(positive)),
        prefix = part.or(false, "prefix", flag),
        maxSeqLen = part.orNull("max_seq_len", long(1..MANY)),
        eosTokenIds = part.or(emptyList(), "eos_token_ids", items(token)),
        unusedTokenIds = part.or(emptyList(), "unused_token_ids", items(range)),
    )
    val expected = "ids below ${text.vocabSize}"
    if (text.eosTokenIds.any { it >= text.vocabSize }) part.refuse("eos_token_ids", text.eosTokenIds, expected)
    if (text.unusedTokenIds.any { it.last >= text.vocabSize }) part.refuse("unused_token_ids", text.unusedTokenIds.toString(), expected)
    return text
}

private fun ownDials(model: Fields, deepest: Int, untrained: Int?): Dials {
    val part = model.at("dials", fields)
    part.at(Dial.MAX_LOOPS, whole(1..MOST_LOOPS))
    val given = Dial.ALL.filter { it.name in part }.associate { it.name to part.at(it.name, number) }
    return try {
        Dials(given).check(deepest, untrained)
    } catch (error: ArgumentException) {
        model.refuse("dials", "some that cannot be set (${error.message})", "the checkpoint's own")
    }
}

private fun callRows(model: Fields, segment: Int?): List<Int> {
    val rows = model.at("chunks", items(count))
    if (rows.firstOrNull() != 1 || rows != rows.distinct().sorted()) {
        model.refuse("chunks", rows, "rising numbers of rows, the first of a model of texts 1")
    }
    if (segment != null && rows.last() > segment) model.refuse("chunks", rows, "at most $segment rows")
    return rows
}

private fun state(called: String, part: Fields, deepest: Int, segment: Int?, page: Int?, methods: Set<String>): State {
    val shape = part.at("shape", shape)
    val kind = part.at("kind", kind)
    val axis = if (kind == StateKind.APPEND && page != null) shape.size - 2 else null
    val tensor = TensorSpec(called, part.at("dtype", dtype), shape, axis)
    val state = State(tensor, kind, part.at("source", name), part.at("read_by", items(reader)), part.at("per_loop", flag))
    if (state.readBy.isEmpty()) part.refuse("read_by", "nothing", "the methods that read it")
    if (state.perLoop && shape.firstOrNull() != deepest) part.refuse("shape", shape, "a row for each of the $deepest loops")
    if (state.hasSlots && shape.size < 3) part.refuse("shape", shape, "positions in the last axis but one")
    if (kind == StateKind.WRITTEN) {
        if (segment == null) part.refuse("kind", kind.label, "another one, since model.segment is null")
        if (state.source !in methods) part.refuse("source", state.source, "some of ${methods.joinToString()}")
    }
    return state
}

private fun checkState(model: Fields, info: ModelInfo) {
    val appended = info.state.values.filter { it.kind == StateKind.APPEND }.map { it.slots }.distinct()
    if (appended.size > 1) model.refuse("state", "appended ones of ${appended.joinToString(" and ")} slots", "as many in each")
    if (info.page != null && appended.isEmpty()) model.refuse("page", info.page, "null, since nothing is appended")
    val nbytes = info.keptBytes()
    if (nbytes > ModelInfo.LARGEST_STATE) model.refuse("state", "$nbytes bytes", "at most ${ModelInfo.LARGEST_STATE} (4 GiB)")
}

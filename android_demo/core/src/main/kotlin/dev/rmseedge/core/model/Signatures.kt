package dev.rmseedge.core.model

import dev.rmseedge.core.json.refuseField

/**
 * Follows every tensor from the method that gives it to those that take it, without running any: a manifest can be whole, its hash
 * right, and still lie.
 *
 * The loop is the graph's (`loop_ROWS`). A `JsonException` names the field that does not fit.
 */
internal fun checkSignatures(info: ModelInfo, methods: Map<String, MethodSpec>) {
    for ((called, spec) in methods) {
        for (tensor in spec.inputs + spec.outputs) {
            if (tensor.ofSlots(info.slots(0)).nbytes > Int.MAX_VALUE) {
                refuseField("methods.$called.${tensor.name}", tensor.shape, "below 2 GiB")
            }
        }
    }
    val flow = Flow(info, methods)
    info.chunks.forEach(flow::call)
    if (info.memory.isNotEmpty()) flow.segment(info.segment!!)
}

/** What the host itself gives to the methods of a call of so many rows, by name; the state among it. */
internal fun givenTensors(info: ModelInfo, rows: Int): Map<String, TensorSpec> {
    val given = linkedMapOf<String, TensorSpec>()
    fun add(name: String, dtype: Dtype, vararg shape: Int) {
        given[name] = TensorSpec(name, dtype, shape.toList())
    }
    for (dial in Dial.ALL) add(dial.name, dial.dtype)
    add("tokens", Dtype.INT64, 1, rows)
    add("position", Dtype.INT64, 1)
    add("n_valid", Dtype.INT64, 1)
    if (info.text.prefix) add("prefix", Dtype.INT64, 1)
    val pairs = info.text.rotaryDims / 2
    if (pairs > 0) {
        for (ending in listOf("") + info.text.furtherThetas.keys.map { "_$it" }) {
            add("cos$ending", Dtype.FLOAT32, 1, rows, pairs)
            add("sin$ending", Dtype.FLOAT32, 1, rows, pairs)
        }
    }
    info.capacity?.let { given["slots"] = TensorSpec("slots", Dtype.INT64, listOf(it), if (info.page == null) null else 0) }
    if (info.memory.isNotEmpty()) add("segment", Dtype.FLOAT32, 1, info.segment!!, info.width)
    if (info.hitRows > 0) {
        add("retrieved", Dtype.FLOAT32, 1, info.hitRows, info.width)
        add("retrieved_scores", Dtype.FLOAT32, 1, info.hitRows)
        add("retrieved_valid", Dtype.BOOL, 1, info.hitRows)
    }
    for ((field, names) in listOf("noise" to info.noise.keys, "state" to info.state.keys)) {
        names.firstOrNull(given::containsKey)?.let { refuseField("model.$field.$it", "a name that hosts give themselves", "another") }
    }
    for (name in info.noise.keys) add(name, Dtype.FLOAT32, 1, rows, info.width)
    for ((name, state) in info.state) given[name] = state.tensor
    return given
}

/** The tensors that a host has at hand, as call follows call. */
private class Flow(private val info: ModelInfo, private val methods: Map<String, MethodSpec>) {
    private var have = mutableMapOf<String, TensorSpec>() // all of them
    private var made = mutableMapOf<String, TensorSpec>() // those that methods gave

    /** prelude, loop, coda, head, commit, and what is left to be kept. */
    fun call(rows: Int) {
        begin(rows)
        run("prelude_$rows")
        if (info.text.prefix && method("loop_$rows").inputs.none { it.name == "prefix" }) {
            refuseField("model.text.prefix", true, "false, since loop_$rows takes no prefix")
        }
        run("loop_$rows")
        require("loop_$rows", TensorSpec("h", Dtype.FLOAT32, listOf(1, rows, info.width)))
        require("loop_$rows", TensorSpec("depth", Dtype.INT64, listOf(1, rows)))
        require("loop_$rows", TensorSpec("iterations", Dtype.INT64, emptyList()))
        if ("coda" in info.methods) run("coda_$rows")
        run("head_$rows")
        require("head_$rows", TensorSpec("logits", Dtype.FLOAT32, listOf(1, rows, info.text.vocabSize)))
        if ("commit" in info.methods) run("commit_$rows")
        for (state in info.state.values) {
            if (state.kind != StateKind.WRITTEN) require("the call of $rows rows", state.taken(rows))
        }
    }

    /** What is done once per segment. */
    fun segment(rows: Int) {
        begin(rows)
        run("blank_$rows")
        for (state in info.memory.values) require("blank_$rows", state.tensor)
        run("memorize_$rows")
        for ((name, state) in info.memory) require("memorize_$rows", state.tensor.copy(name = "next_$name"))
        require("memorize_$rows", TensorSpec("surprise", Dtype.FLOAT32, listOf(1)))
    }

    private fun begin(rows: Int) {
        have = givenTensors(info, rows).toMutableMap()
        made = mutableMapOf()
    }

    private fun method(called: String): MethodSpec =
        methods[called] ?: refuseField("methods", methods.keys.joinToString(), "$called among them")

    private fun run(called: String) {
        method(called).inputs.forEach { take(called, it) }
        method(called).outputs.forEach { give(called, it) }
    }

    private fun take(called: String, tensor: TensorSpec) {
        val field = "methods.$called.inputs.${tensor.name}"
        val given = have[tensor.name] ?: refuseField(field, "a tensor that nothing gives", "some of ${have.keys.joinToString()}")
        if (tensor.slotsAxis != given.slotsAxis) refuseField("$field.slots_axis", tensor.slotsAxis, "${given.slotsAxis}")
        if (!tensor.fits(given)) refuseField(field, tensor.toString(), given.toString())
    }

    private fun give(called: String, tensor: TensorSpec) {
        val field = "methods.$called.outputs.${tensor.name}"
        if (tensor.slotsAxis != null) refuseField("$field.slots_axis", tensor.slotsAxis, "null")
        val known = have.getOrPut(tensor.name) { tensor }
        if (!known.fits(tensor)) refuseField(field, tensor.toString(), known.toString())
        made.putIfAbsent(tensor.name, tensor)
    }

    private fun require(called: String, wanted: TensorSpec) {
        val got = made[wanted.name]
        if (got == null || !got.fits(wanted)) {
            refuseField("methods.$called.outputs.${wanted.name}", got?.toString() ?: "no such tensor", wanted.toString())
        }
    }
}

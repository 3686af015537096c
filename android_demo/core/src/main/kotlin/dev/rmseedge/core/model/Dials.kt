package dev.rmseedge.core.model

import dev.rmseedge.core.ArgumentException

/**
 * One setting of the quality dial: how many loops a token may take, or a threshold that it stops at.
 *
 * @property least the smallest value; with [exclusive] itself no value.
 * @property off the value that disables the rule; null: it is a number of loops and no rule.
 * @property expected what values it has, in words.
 */
class Dial private constructor(
    val name: String,
    val dtype: Dtype,
    val help: String,
    val least: Double,
    val exclusive: Boolean,
    val off: Double?,
    private val expected: String,
) {
    /** Whether the rule can stop anything at this value. */
    fun enables(value: Double): Boolean = off != null && if (exclusive) value < off else value > off

    /** Fails where the rule cannot have this value. */
    internal fun check(value: Double) {
        val whole = dtype != Dtype.INT64 || value % 1 == 0.0
        val within = if (exclusive) value > least else value >= least
        if (!(whole && within && value.isFinite())) throw ArgumentException(name, "got ${shown(value)}, expected $expected")
    }

    companion object {
        const val MAX_LOOPS = "max_loops"
        const val MIN_LOOPS = "min_loops"

        private fun loops(name: String, help: String) = Dial(name, Dtype.INT64, help, 1.0, false, null, "")

        private fun rule(name: String, help: String) =
            Dial(name, Dtype.FLOAT32, "$help to stop at; 0 disables", 0.0, false, 0.0, "0 (off) or more")

        /** All there are, in the order of manifests; a model's own are `ModelInfo.rules`. */
        val ALL: List<Dial> = listOf(
            loops(MAX_LOOPS, "iterations at most"),
            loops(MIN_LOOPS, "iterations before a token may stop"),
            Dial(
                "exit_threshold",
                Dtype.FLOAT32,
                "brake score to stop at; 1 disables",
                0.0,
                true,
                1.0,
                "a positive number (1 disables it)",
            ),
            rule("exit_epsilon", "state change"),
            rule("exit_entropy", "entropy (nats)"),
            rule("exit_cosine", "1 - cosine of two loops' states"),
            rule("exit_kl", "KL divergence (nats) of two loops' predictions"),
            rule("exit_entropy_change", "entropy change (nats)"),
            Dial(
                "exit_steady",
                Dtype.INT64,
                "loops without another likeliest token to stop at; 0 disables",
                0.0,
                false,
                0.0,
                "0 (off) or a whole number",
            ),
            Dial(
                "exit_gap",
                Dtype.FLOAT32,
                "mean lead (logits) at which a block is filled in whole; 0 disables",
                0.0,
                false,
                0.0,
                "0 (off) or more",
            ),
            Dial(
                "route",
                Dtype.FLOAT32,
                "layers that a prompt is run through: -0.5 as routers say, less skips more; 0.5 disables",
                -1.0,
                true,
                0.5,
                "a number above -1 (0.5 runs every layer once)",
            ),
        )
        val BY_NAME: Map<String, Dial> = ALL.associateBy { it.name }
    }
}

/** The quality dial of one call, by the names of [Dial.ALL]; what is left out is off. Loops count from 1. */
class Dials(values: Map<String, Double>) {
    private val values: Map<String, Double> =
        Dial.ALL.associate { dial -> dial.name to (values[dial.name] ?: dial.off ?: dial.least) }

    constructor(maxLoops: Int) : this(mapOf(Dial.MAX_LOOPS to maxLoops.toDouble()))

    val maxLoops: Int get() = get(Dial.MAX_LOOPS).toInt()
    val minLoops: Int get() = get(Dial.MIN_LOOPS).toInt()

    /** Whether any rule can stop a position before [maxLoops]. */
    val exits: Boolean get() = Dial.ALL.any { it.enables(get(it.name)) }

    operator fun get(dial: String): Double = values.getValue(dial)

    fun toMap(): Map<String, Double> = values

    /** These with some replaced, unchecked; `ModelInfo.dialsWith` checks. A `max_loops` alone lowers `min_loops`. */
    fun with(changes: Map<String, Double>): Dials {
        changes.keys.firstOrNull { it !in values }?.let {
            throw ArgumentException(it, "no dial has this name, expected one of ${values.keys.joinToString()}")
        }
        val most = changes[Dial.MAX_LOOPS] ?: get(Dial.MAX_LOOPS)
        val lowered = Dial.MIN_LOOPS to minOf(get(Dial.MIN_LOOPS), maxOf(1.0, most))
        return Dials(values + lowered + changes)
    }

    /**
     * Themselves, if a model that runs [deepest] loops at most can run them.
     *
     * @param untrained how many of those are beyond the depth that it was trained to, where its configuration says so.
     */
    @Throws(ArgumentException::class)
    fun check(deepest: Int, untrained: Int?): Dials {
        checkLoops(Dial.MAX_LOOPS, deepest, depthText(untrained))
        checkLoops(Dial.MIN_LOOPS, maxLoops, Dial.MAX_LOOPS)
        for (dial in Dial.ALL) if (dial.off != null) dial.check(get(dial.name))
        return this
    }

    private fun checkLoops(dial: String, most: Int, which: String) {
        val value = get(dial)
        if (value % 1 != 0.0) throw ArgumentException(dial, "got ${shown(value)}, expected a whole number in 1..$most ($which)")
        if (value < 1 || value > most) throw ArgumentException(dial, "got ${shown(value)}, expected 1..$most ($which)")
    }

    override fun equals(other: Any?): Boolean = other is Dials && other.values == values

    override fun hashCode(): Int = values.hashCode()

    override fun toString(): String = values.entries.joinToString { (name, value) -> "$name=${shown(value)}" }
}

private fun depthText(untrained: Int?): String {
    val trained = "the depth the model was trained to"
    return when (untrained) {
        null -> trained
        0 -> "$trained; untrained_loops in its config.json allows more"
        else -> "$untrained of them beyond $trained, by untrained_loops in its config.json"
    }
}

/** A number without the fraction that it does not have. */
internal fun shown(value: Double): String =
    if (value % 1 == 0.0 && kotlin.math.abs(value) < 1e15) value.toLong().toString() else value.toString()

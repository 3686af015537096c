package dev.rmseedge.demo.logic

/** The name that a package gets on this device, from that of its file: "rmse-shakespeare-onnx.rmse.zip" has it in front. */
fun modelName(file: String): String {
    val base = file.substringAfterLast('/').removeSuffix(".zip").removeSuffix(".rmse")
    val safe = base.map { if (it.isLetterOrDigit() || it in "-_.") it else '-' }.joinToString("").trim('-', '.').take(LONGEST)
    return safe.ifEmpty { "model" }
}

/** [name], with a number behind it if it is among [taken]. */
fun unusedName(name: String, taken: Collection<String>): String =
    generateSequence(1) { it + 1 }.map { if (it == 1) name else "$name-$it" }.first { it !in taken }

private const val LONGEST = 80

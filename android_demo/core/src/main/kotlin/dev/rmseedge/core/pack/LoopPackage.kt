package dev.rmseedge.core.pack

import dev.rmseedge.core.PackageException
import dev.rmseedge.core.json.Fields
import dev.rmseedge.core.json.Json
import dev.rmseedge.core.json.JsonException
import dev.rmseedge.core.json.fields
import dev.rmseedge.core.json.long
import dev.rmseedge.core.model.MethodSpec
import dev.rmseedge.core.model.ModelInfo
import dev.rmseedge.core.model.checkSignatures
import dev.rmseedge.core.model.readMethods
import dev.rmseedge.core.model.readModel
import dev.rmseedge.core.text.ChatTurns
import dev.rmseedge.core.text.Tokenizer
import java.io.File
import java.io.IOException
import java.nio.file.Files
import java.nio.file.LinkOption
import java.nio.file.Path

/** How far a long piece of work has come, in bytes. */
typealias Progress = (done: Long, total: Long) -> Unit

/**
 * A verified package on disk: the folder that an export leaves, whose SHA256SUMS lists every other file with its hash.
 *
 * All of it is checked before any engine sees a byte: some engines end the process on damaged input, others compute with it.
 *
 * @property methods what every METHOD_ROWS takes and gives.
 */
class LoopPackage private constructor(
    val folder: File,
    val info: ModelInfo,
    val methods: Map<String, MethodSpec>,
    private val index: PackageIndex,
) {
    /** What it was made for. */
    val target: Target get() = index.target

    /** Bytes of the experts that may be given less memory than they have; 0: there are none, or no engine that could. */
    val expertBytes: Long get() = lowering.or(0L, "expert_bytes", long(0..Long.MAX_VALUE))

    /** How its chat template puts messages into a text; null: it has none, or one that [hasUnreadTemplate] tells of. */
    val turns: ChatTurns? by lazy { PackageIndex.namingManifest(folder.path) { index.manifest.orNull("chat", fields)?.let(ChatTurns::of) } }

    /** Whether it has a chat template that cannot be put as text around messages, which only Python renders. */
    val hasUnreadTemplate: Boolean get() = turns == null && TEMPLATE_FILES.any { it in index.digests }

    /** Bytes of all files. */
    val nbytes: Long get() = info.nbytes

    /** The text that the model was exported with, to read in benches; null: there is none. */
    val sample: String? get() = if (SAMPLE in index.digests) readText(SAMPLE) else null

    /** The manifest's "lowering": what the engine of this target has to know. */
    internal val lowering: Fields get() = section("lowering")

    /**
     * The package's tokenizer.
     *
     * @throws PackageException there is none, or it is of a kind that cannot be read here; names the kind.
     */
    @Throws(PackageException::class)
    fun tokenizer(): Tokenizer = Tokenizer.open(path(TOKENIZER)).fitting(info.text.vocabSize)

    /** The path of a listed file. */
    @Throws(PackageException::class)
    fun path(name: String): File {
        if (name !in index.digests) throw PackageException("$folder: the package holds no $name; export it again")
        return File(folder, name)
    }

    /**
     * Memory in bytes that the model is going to take, with the state of a text of so many tokens, above what the process takes without
     * it: an estimate from above. Weights are there twice, in their mapped file and laid out for the operators.
     */
    fun predictedBytes(positions: Long = 0): Long = target.engineBytes + 2 * nbytes + info.keptBytes(positions)

    /** The same package at another place, where it was moved to. */
    internal fun movedTo(folder: File) = LoopPackage(folder, info, methods, index)

    internal fun section(name: String): Fields = PackageIndex.namingManifest(folder.path) { index.manifest.at(name, fields) }

    private fun readText(name: String): String = try {
        Json.readText(path(name))
    } catch (error: JsonException) {
        throw PackageException("${path(name)}: ${error.message}; export the package again", error)
    } catch (error: IOException) {
        throw PackageException("${path(name)}: cannot be read (${error.message})", error)
    }

    companion object {
        private val TEMPLATE_FILES = listOf("chat_template.jinja", "tokenizer_config.json")
        private const val SAMPLE = "sample.txt"
        private const val TOKENIZER = "tokenizer.json"

        /**
         * Reads and verifies a package: its format, its target, that no file is missing, changed or unlisted, and that its methods fit
         * together.
         *
         * @param label what messages call it.
         */
        @Throws(PackageException::class)
        fun open(folder: File, label: String = folder.path, progress: Progress = { _, _ -> }): LoopPackage {
            if (!folder.isDirectory) {
                val what = if (folder.exists()) "is no folder, expected a package folder" else "no such package folder"
                throw PackageException("$label: $what; make one with rmse-export")
            }
            try {
                val index = PackageIndex.read(
                    label,
                    small(folder, label, PackageIndex.MANIFEST),
                    small(folder, label, PackageIndex.SUMS),
                )
                val nbytes = checkFiles(folder, label, index, progress)
                return PackageIndex.namingManifest(label) {
                    val info = readModel(index.manifest, nbytes)
                    val methods = readMethods(index.manifest)
                    if (index.target == Target.ONNX) checkSignatures(info, methods) // the runner holds its own against its program
                    LoopPackage(folder, info, methods, index)
                }
            } catch (error: IOException) {
                throw PackageException("$label: cannot be read (${error.message}); copy it again", error)
            }
        }

        /** The bytes of a small file that every package has. */
        private fun small(folder: File, label: String, name: String): ByteArray {
            val file = File(folder, name)
            if (!file.isFile) throw PackageException("$label/$name: missing; $label is not a package")
            if (file.length() > Json.LARGEST) {
                throw PackageException("$label/$name: larger than ${Json.LARGEST shr 20} MiB, which no such file is; export again")
            }
            return file.readBytes()
        }

        /** Holds the files against the lists; returns their bytes. */
        private fun checkFiles(folder: File, label: String, index: PackageIndex, progress: Progress): Long {
            val present = filesIn(folder.toPath())
            (index.files - present).firstOrNull()?.let { throw PackageException("$label/$it: missing from the package; export it again") }
            (present - index.files).firstOrNull()?.let {
                throw PackageException("$label/$it: not listed in the package's ${PackageIndex.SUMS}; remove it or export again")
            }
            val files = index.files.associateWith { File(folder, it) }
            for ((name, file) in files) {
                if (!Files.isRegularFile(file.toPath())) throw PackageException("$label/$name: is no file; export the package again")
                val size = index.sizes[name] ?: continue
                if (file.length() != size) {
                    val how = if (file.length() < size) "truncated" else "written to since"
                    throw PackageException("$label/$name: ${file.length()} bytes, the manifest says $size; $how? export again")
                }
            }
            val total = files.values.sumOf { it.length() }
            var done = 0L
            for ((name, digest) in index.digests) {
                val found = sha256(files.getValue(name)) { read ->
                    done += read
                    progress(done, total)
                }
                if (found != digest) {
                    throw PackageException(
                        "$label/$name: its SHA-256 is not that in ${PackageIndex.SUMS}; the file is damaged, export again",
                    )
                }
            }
            return total
        }

        /** Everything below a folder that is no folder, by its path from there. */
        private fun filesIn(folder: Path): Set<String> = Files.walk(folder).use { paths ->
            paths.iterator().asSequence()
                .filterNot { Files.isDirectory(it, LinkOption.NOFOLLOW_LINKS) }
                .map { folder.relativize(it).joinToString("/") }
                .toSet()
        }
    }
}

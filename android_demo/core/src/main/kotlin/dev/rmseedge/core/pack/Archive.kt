package dev.rmseedge.core.pack

import dev.rmseedge.core.PackageException
import dev.rmseedge.core.json.Json
import java.io.File
import java.io.IOException
import java.io.InputStream
import java.nio.file.Files
import java.nio.file.StandardCopyOption
import java.util.zip.ZipEntry
import java.util.zip.ZipInputStream

/**
 * A package as one file, NAME.rmse.zip: the files of the package, stored and not compressed, as `rmse-export` writes them.
 *
 * Nothing is taken on trust: no entry leads out of the folder, no more is written than the manifest says and than there is room for, and
 * what was written is verified like any package. It becomes visible only then, whole, under its name; whatever fails leaves nothing behind.
 */
object Archive {
    private const val SCRATCH = ".unpacking-"
    private const val SPARE = 32L shl 20 // bytes of the disk that stay free

    /** Unpacks [archive]; see the other `unpack`. */
    @Throws(PackageException::class)
    fun unpack(archive: File, parent: File, name: String, progress: Progress = { _, _ -> }): LoopPackage {
        if (!archive.isFile) throw PackageException("$archive: no such file; make one with rmse-export --archive")
        return unpack(archive.inputStream(), parent, name, archive.name, progress = progress)
    }

    /**
     * Unpacks an archive, which is read once from its beginning and closed, to the folder [name] of [parent], in place of what is there.
     *
     * @param label what messages call the archive.
     * @param room bytes that may be written.
     */
    @Throws(PackageException::class)
    fun unpack(
        archive: InputStream,
        parent: File,
        name: String,
        label: String = name,
        room: Long = maxOf(0, parent.usableSpace - SPARE),
        progress: Progress = { _, _ -> },
    ): LoopPackage {
        val scratch = try {
            Files.createTempDirectory(parent.toPath(), SCRATCH).toFile()
        } catch (error: IOException) {
            throw PackageException("$parent: cannot be written (${error.message}); free some space", error)
        }
        try {
            val folder = File(scratch, "files").apply { mkdir() }
            ZipInputStream(archive).use { Unpacking(it, folder, label, room, progress).run() }
            val found = LoopPackage.open(folder, label)
            val destination = File(parent, name)
            replace(destination, folder, File(scratch, "before"))
            return found.movedTo(destination)
        } catch (error: IOException) {
            throw PackageException("$label: not a whole zip archive, or cannot be written (${error.message}); copy it again", error)
        } catch (error: IllegalArgumentException) { // of a name that is not UTF-8
            throw PackageException("$label: not a whole zip archive (${error.message}); copy it again", error)
        } finally {
            scratch.deleteRecursively()
        }
    }

    /** Removes what a process left in [parent] that ended while it unpacked. */
    fun tidy(parent: File) {
        parent.listFiles { file -> file.name.startsWith(SCRATCH) }?.forEach(File::deleteRecursively)
    }

    /** Puts a verified folder in the place of the destination. */
    private fun replace(destination: File, folder: File, before: File) {
        if (destination.exists()) Files.move(destination.toPath(), before.toPath(), StandardCopyOption.ATOMIC_MOVE)
        Files.move(folder.toPath(), destination.toPath(), StandardCopyOption.ATOMIC_MOVE)
    }
}

/** One run through an archive. */
private class Unpacking(
    private val archive: ZipInputStream,
    private val folder: File,
    private val label: String,
    private val room: Long,
    private val progress: Progress,
) {
    private val known = mutableSetOf<String>() // names in small letters: some file systems take "A" for "a"
    private val piece = ByteArray(1 shl 16)
    private var index: PackageIndex? = null // as soon as both of its files are there: in archives of rmse-export, before all others
    private var written = 0L

    fun run() {
        while (true) {
            val entry = archive.nextEntry ?: break
            problemOf(entry)?.let { refuse(entry.name, "$it; make the archive with rmse-export") }
            if (entry.isDirectory) continue
            write(entry.name)
            if (index == null) index = readIndex()
        }
        if (index == null) {
            throw PackageException("$label: not a zip archive of a package: it holds no ${PackageIndex.SUMS} and ${PackageIndex.MANIFEST}")
        }
    }

    /** Why an entry is none of a package; null: it may be. */
    private fun problemOf(entry: ZipEntry): String? {
        val parts = entry.name.removeSuffix("/").split('/')
        return when {
            entry.name.any { it == '\\' || it == ':' || it.isISOControl() } || parts.any { it.isEmpty() || it == "." || it == ".." } ->
                "leaves the folder it is unpacked in"

            entry.name.length > LONGEST_NAME -> "no name of a file"

            !known.add(entry.name.lowercase()) -> "occurs twice"

            entry.method != ZipEntry.STORED -> "is compressed, expected stored (zip -0)"

            else -> null
        }
    }

    private fun write(name: String) {
        val index = index
        if (index != null && name !in index.files) refuse(name, "not listed in the package's ${PackageIndex.SUMS}; export it again")
        val most = if (name in INDEX) Json.LARGEST.toLong() else index?.sizes?.get(name) ?: room
        val file = File(folder, name).apply { parentFile?.mkdirs() }
        var size = 0L
        file.outputStream().use { output ->
            while (true) {
                val count = archive.read(piece)
                if (count < 0) break
                size += count
                written += count
                if (size > most) refuse(name, "larger than the $most bytes that it may have; the archive is damaged, export it again")
                if (written > room) throw PackageException("$label: needs more than the $room bytes that are free here; free some space")
                output.write(piece, 0, count)
                progress(written, index?.sizes?.values?.sum() ?: written)
            }
        }
    }

    /** What the package says of itself, once both files are there: another target or format is refused before all else is written. */
    private fun readIndex(): PackageIndex? {
        val files = INDEX.map { File(folder, it) }
        if (!files.all(File::isFile)) return null
        val (manifest, sums) = files.map(File::readBytes)
        val found = PackageIndex.read(label, manifest, sums)
        val total = found.sizes.values.fold(0L) { sum, size -> minOf(sum, Long.MAX_VALUE - size) + size }
        if (total > room) throw PackageException("$label: needs $total bytes, and $room are free here; free some space")
        return found
    }

    private fun refuse(name: String, problem: String): Nothing = throw PackageException("$label: ${name.take(LONGEST_NAME)}: $problem")

    private companion object {
        const val LONGEST_NAME = 200
        val INDEX = listOf(PackageIndex.MANIFEST, PackageIndex.SUMS)
    }
}

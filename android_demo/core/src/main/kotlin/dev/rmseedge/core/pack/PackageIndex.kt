package dev.rmseedge.core.pack

import dev.rmseedge.core.PackageException
import dev.rmseedge.core.json.Fields
import dev.rmseedge.core.json.Json
import dev.rmseedge.core.json.JsonException
import dev.rmseedge.core.json.Reader
import dev.rmseedge.core.json.long
import dev.rmseedge.core.json.members
import dev.rmseedge.core.json.name

/**
 * What a package says about itself: the manifest, held against the list of hashes, and what both say about the files.
 *
 * @property digests SHA-256 of every file but the list itself, by name.
 * @property sizes bytes of every file but the manifest and the list.
 */
internal class PackageIndex private constructor(
    val manifest: Fields,
    val digests: Map<String, String>,
    val sizes: Map<String, Long>,
    val target: Target,
) {
    /** Names of all files that the package has. */
    val files: Set<String> get() = digests.keys + SUMS

    companion object {
        const val MANIFEST = "manifest.json"
        const val SUMS = "SHA256SUMS"
        private const val FORMAT = "rmse-edge package"
        private const val FORMAT_VERSION = 2L
        private val anything = Reader { value, _ -> value }

        /**
         * @param where what messages call the package.
         */
        fun read(where: String, manifest: ByteArray, sums: ByteArray): PackageIndex {
            val fields = readManifest("$where/$MANIFEST", manifest)
            val digests = readSums("$where/$SUMS", sums)
            if (sha256(manifest) != digests[MANIFEST]) {
                throw PackageException("$where/$MANIFEST: was edited after the export (its SHA-256 is not that in $SUMS); export again")
            }
            return namingManifest(where) {
                val own = fields.at("target", name)
                val target = Target.of(own) { throw PackageException("$where: made for $own, $it; export with --target onnx") }
                PackageIndex(fields, digests, fields.at("sizes", members(long(0..(1L shl 53)))), target)
            }
        }

        /** What [read] gives; of a value that does not fit it says that it is the manifest's. */
        inline fun <T> namingManifest(where: String, read: () -> T): T = try {
            read()
        } catch (error: JsonException) {
            throw PackageException("$where/$MANIFEST: ${error.message}; export the package again", error)
        }

        /** Of any version: an older one had no list of hashes, and is to be refused as what it is. */
        private fun readManifest(path: String, bytes: ByteArray): Fields {
            val manifest = try {
                Fields(Json.parse(Json.decode(bytes)))
            } catch (error: JsonException) {
                throw PackageException("$path: not readable as JSON (${error.message}); export the package again", error)
            }
            if (manifest.orNull("format", anything) != FORMAT) throw PackageException("$path: not the manifest of an $FORMAT")
            val version = manifest.orNull("format_version", anything)
            if (version != FORMAT_VERSION) {
                throw PackageException(
                    "$path: format version $version, and this app reads $FORMAT_VERSION; export the package again, or update the app",
                )
            }
            return manifest
        }
    }
}

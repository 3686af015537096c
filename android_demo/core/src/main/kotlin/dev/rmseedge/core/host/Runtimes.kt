package dev.rmseedge.core.host

import dev.rmseedge.core.PackageException
import dev.rmseedge.core.engine.OnnxEngine
import dev.rmseedge.core.pack.LoopPackage
import dev.rmseedge.core.pack.Target
import dev.rmseedge.core.runner.RunnerRuntime

/**
 * Loads a verified package with the engine that it was made for.
 *
 * @param threads of one call; null: the engine's own choice.
 * @param expertMemory what experts may take, see [RunnerRuntime]; null: no bound. Only ExecuTorch packages keep one.
 * @throws PackageException the engine cannot load it.
 */
@Throws(PackageException::class)
fun openRuntime(pack: LoopPackage, threads: Int? = null, expertMemory: String? = null): LoopRuntime = when (pack.target) {
    Target.EXECUTORCH -> RunnerRuntime(pack, threads, expertMemory)

    Target.ONNX -> {
        if (expertMemory != null) {
            throw PackageException("${pack.folder}: made for ONNX Runtime, which keeps no budget for experts; leave it out")
        }
        val engine = OnnxEngine(pack, threads)
        try {
            HostedRuntime(pack, engine)
        } catch (error: Throwable) { // an engine holds memory that no collector frees
            engine.close()
            throw error
        }
    }
}

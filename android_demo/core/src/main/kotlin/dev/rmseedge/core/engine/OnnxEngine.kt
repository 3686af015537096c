package dev.rmseedge.core.engine

import ai.onnxruntime.NodeInfo
import ai.onnxruntime.OnnxJavaType
import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtException
import ai.onnxruntime.OrtSession
import ai.onnxruntime.TensorInfo
import dev.rmseedge.core.PackageException
import dev.rmseedge.core.json.members
import dev.rmseedge.core.json.name
import dev.rmseedge.core.json.refuseField
import dev.rmseedge.core.json.whole
import dev.rmseedge.core.model.Dtype
import dev.rmseedge.core.model.MethodSpec
import dev.rmseedge.core.model.TensorSpec
import dev.rmseedge.core.pack.LoopPackage
import dev.rmseedge.core.pack.PackageIndex
import java.io.File

private val TYPES = mapOf(
    Dtype.FLOAT32 to OnnxJavaType.FLOAT,
    Dtype.FLOAT16 to OnnxJavaType.FLOAT16,
    Dtype.BFLOAT16 to OnnxJavaType.BFLOAT16,
    Dtype.INT64 to OnnxJavaType.INT64,
    Dtype.INT32 to OnnxJavaType.INT32,
    Dtype.INT8 to OnnxJavaType.INT8,
    Dtype.UINT8 to OnnxJavaType.UINT8,
    Dtype.BOOL to OnnxJavaType.BOOL,
)

/**
 * ONNX Runtime. The loop runs inside the graph, whose weights the engine reads from their file by its path.
 *
 * A graph serves calls of all sizes: a second session would lay out the weights a second time.
 *
 * @param threads of one call; null: the engine's own choice.
 */
class OnnxEngine(private val pack: LoopPackage, override val threads: Int? = null) : Engine {
    // Its build for Android has a client for telemetry.
    private val environment = OrtEnvironment.getEnvironment().apply { setTelemetry(false) }
    private val graphs: Map<String, String> = PackageIndex.namingManifest(pack.folder.path) { pack.lowering.at("graphs", members(name)) }
    private val sessions = mutableMapOf<String, OrtSession>() // by file

    override val description: String get() = "onnxruntime ${environment.version}"

    /** What to do about a graph that cannot be loaded: experts that round activations need ONNX Runtime 1.30. */
    private val advice: String
        get() = pack.lowering.or(0, "accuracy_level", whole(0..4)).let { level ->
            if (level == 0) "export the package again" else "export it with --accuracy-level 0"
        }

    override fun load(method: String, spec: MethodSpec): Method {
        val graph = graphs[method] ?: throw PackageException("${pack.folder}: holds no $method; it has ${graphs.keys.joinToString()}")
        val file = pack.path(graph)
        try {
            val session = sessions.getOrPut(graph) { session(file) }
            check(file, method, "inputs", spec.inputs, session.inputInfo)
            check(file, method, "outputs", spec.outputs, session.outputInfo)
            return OnnxMethod("${pack.folder}: $method", environment, session, spec)
        } catch (error: OrtException) {
            val reason = error.message.orEmpty().substringAfter("failed:").takeLast(LONGEST_REASON)
            throw PackageException("$file: $description cannot load it ($reason); $advice", error)
        }
    }

    override fun close() = sessions.values.forEach(OrtSession::close)

    private fun session(file: File): OrtSession = OrtSession.SessionOptions().use { options ->
        // Several sessions live in one process: idle threads that spin would take cores from the one at work.
        options.addConfigEntry("session.intra_op.allow_spinning", "0")
        options.setCPUArenaAllocator(false)
        options.setMemoryPatternOptimization(false)
        threads?.let(options::setIntraOpNumThreads)
        environment.createSession(file.path, options)
    }

    /** Holds the manifest against the graph. Sizes that vary from call to call are -1 there: rows, slots. */
    private fun check(file: File, method: String, side: String, said: List<TensorSpec>, found: Map<String, NodeInfo>) {
        if (said.size != found.size) {
            refuse(file, "methods.$method.$side", "${said.size} tensors", "${found.size}, as the graph has them")
        }
        for (tensor in said) {
            val info = found[tensor.name]?.info as? TensorInfo
            val fits = info != null && info.type == TYPES[tensor.dtype] && info.shape.size == tensor.shape.size &&
                info.shape.indices.all { info.shape[it] == -1L || info.shape[it] == tensor.shape[it].toLong() }
            if (!fits) refuse(file, "methods.$method.$side", "$tensor", "${info?.shape?.toList()} ${info?.type}, as the graph has it")
        }
    }

    private fun refuse(file: File, field: String, got: String, expected: String): Nothing =
        PackageIndex.namingManifest("${file.parent}") { refuseField(field, got, expected) }

    private companion object {
        const val LONGEST_REASON = 240 // the end of what it says names the operator
    }
}

private class OnnxMethod(
    private val name: String,
    private val environment: OrtEnvironment,
    private val session: OrtSession,
    override val spec: MethodSpec,
) : Method {
    private val inputs = linkedMapOf<String, OnnxTensor>()
    private val outputs = linkedMapOf<String, OnnxTensor>()

    override fun read(input: Int, tensor: Tensor) = bind(inputs, spec.inputs[input], tensor)

    override fun write(output: Int, tensor: Tensor) = bind(outputs, spec.outputs[output], tensor)

    override fun run() = try {
        session.run(inputs, emptySet(), outputs).close() // what was bound stays open
    } catch (error: OrtException) {
        throw PackageException("$name: onnxruntime cannot run it (${error.message}); export the package again, or free some memory", error)
    }

    override fun close() = (inputs.values + outputs.values).forEach(OnnxTensor::close)

    private fun bind(side: MutableMap<String, OnnxTensor>, argument: TensorSpec, tensor: Tensor) {
        val shape = tensor.spec.shape.map(Int::toLong).toLongArray()
        val bound = OnnxTensor.createTensor(
            environment,
            tensor.bytes.duplicate().order(tensor.bytes.order()),
            shape,
            TYPES.getValue(argument.dtype),
        )
        side.put(argument.name, bound)?.close()
    }
}

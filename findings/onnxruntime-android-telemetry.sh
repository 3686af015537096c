#!/usr/bin/env bash
# ONNX Runtime's library for Android has a client for telemetry: classes that send by HTTP, started by a ContentProvider, and native code
# of Microsoft's 1DS beside the engine. The archive's own manifest names neither the provider nor a permission for the network, so it
# sends nothing until an app declares both. `OrtEnvironment.setTelemetry(false)` says no to it. The archive here is the one that npm has.
#
# Seen, com.github.asus4.onnxruntime 0.4.9 (ONNX Runtime 1.29.0):
#   classes: TelemetryInitializer HttpClient Request; native entries: 8; named in the manifest: 0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
npm pack --silent com.github.asus4.onnxruntime@0.4.9 >/dev/null
tar -xzf com.github.asus4.onnxruntime-0.4.9.tgz package/Plugins/Android/onnxruntime.aar
cat > show.py <<'PY'
import io
import re
import zipfile

archive = zipfile.ZipFile("package/Plugins/Android/onnxruntime.aar")
names = zipfile.ZipFile(io.BytesIO(archive.read("classes.jar"))).namelist()
found = [n for n in ("TelemetryInitializer", "telemetry/HttpClient", "telemetry/Request") if f"ai/onnxruntime/{n}.class" in names]
library = archive.read("jni/arm64-v8a/libonnxruntime.so")
native = set(re.findall(rb"Java_ai_onnxruntime_telemetry_HttpClient_\w+", library))
manifest = archive.read("AndroidManifest.xml").decode()
named = sum(word in manifest for word in ("TelemetryInitializer", "android.permission.INTERNET"))
print(f"classes: {' '.join(n.split('/')[-1] for n in found)}; native entries: {len(native)}; named in the manifest: {named}")
PY
said=$(python3 show.py)
echo "$said"
[ "$said" = "classes: TelemetryInitializer HttpClient Request; native entries: 8; named in the manifest: 0" ]

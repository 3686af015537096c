#!/usr/bin/env bash
# Compiles Kotlin of the demo against Android's public API: android_demo/compile.sh OUT.jar CLASSPATH SOURCES...
# Without arguments it only makes what everything is compiled against, build/android/android.jar.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
parts=build/android/parts
python=${PYTHON:-.venv/bin/python}
java=${JAVA_HOME:+$JAVA_HOME/bin/}java
command -v "$java" >/dev/null || { echo "error: no java; install a JDK of version 17 or later" >&2; exit 2; }

if [ ! -f build/android/android.jar ] || [ "$parts/api/.sha256" -nt build/android/android.jar ]; then
    new=$(mktemp build/android/android.jar.XXXXXX)
    "$python" -m android_demo.stubs "$parts/api/api/current.txt" "$new"
    mv "$new" build/android/android.jar # at once: others may be compiling
fi
[ $# -gt 0 ] || exit 0

out=$1 classpath=$2
shift 2
# java.* comes from the same list: what Android 10 lacks of the JDK does not compile. Lambdas and strings as any dex tool takes them.
exec "$java" -Xmx1500m -cp "$parts/kotlin/lib/*" org.jetbrains.kotlin.cli.jvm.K2JVMCompiler \
    -no-jdk -no-stdlib -no-reflect -jvm-target 11 -Werror -Xlambdas=class -Xsam-conversions=class -Xstring-concat=inline \
    -classpath "build/android/android.jar:$parts/kotlin/lib/kotlin-stdlib.jar:$classpath" -d "$out" "$@"

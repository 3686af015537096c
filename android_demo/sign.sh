#!/usr/bin/env bash
# Signs an app and verifies it: android_demo/sign.sh [-k KEYSTORE] UNSIGNED.apk SIGNED.apk
#
#   -k   a keystore; $KEYSTORE_PASSWORD_FILE names the file with its password, $KEYSTORE_ALIAS the key in it. Without it, a key
#        is made for this machine, as Android Studio does for debugging
set -euo pipefail
build=$(cd "$(dirname "${BASH_SOURCE[0]}")/../build/android" && pwd)
source "$(dirname "${BASH_SOURCE[0]}")/versions.sh"
signer=(java -cp "$build/parts/apksigner/usr/share/java/apksigner.jar:$build/parts/apksig/usr/share/java/apksig.jar"
    com.android.apksigner.ApkSignerTool)

keystore=
if [ "$1" = -k ]; then
    keystore=$2
    shift 2
fi
if [ -z "$keystore" ]; then
    keystore=$build/debug.keystore KEYSTORE_ALIAS=debug KEYSTORE_PASSWORD_FILE=$build/debug.password
    if [ ! -f "$keystore" ]; then
        echo android >"$KEYSTORE_PASSWORD_FILE"
        keytool -genkeypair -keystore "$keystore" -storetype PKCS12 -storepass:file "$KEYSTORE_PASSWORD_FILE" -alias debug \
            -keyalg RSA -keysize 2048 -validity 10000 -dname CN=debug 2>/dev/null
    fi
fi
"${signer[@]}" sign --ks "$keystore" --ks-key-alias "${KEYSTORE_ALIAS:?names the key in the keystore}" \
    --ks-pass "file:${KEYSTORE_PASSWORD_FILE:?names the file with its password}" \
    --min-sdk-version "$MIN_SDK" --v1-signing-enabled false --v4-signing-enabled false --out "$2" "$1"
"${signer[@]}" verify --min-sdk-version "$MIN_SDK" "$2"

#!/bin/bash
# The kernels under compute-sanitizer, on a GPU: no access out of bounds (memcheck), no race in shared memory (racecheck).
#
#   PYTHON=.venv/bin/python tests/ops/sanitize.sh        # a minute or two; one line a tool at the end, exit code 1 if any found something
#
# A few cases of the tests, first as they are, so that the kernels are compiled (into the usual cache) before they are watched.
cd "$(dirname "$0")/../.." || exit 1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
cases="test_strided_inputs_equal or (test_documents_are_isolated and 33) or (test_segments and odd-length and bfloat16 and not state_size)"
cases="$cases or (test_cases and odd-length and bfloat16 and 37-3)"
run=("${PYTHON:-python3}" -m pytest tests/ops/test_cuda_scan.py tests/ops/test_cuda_conv.py -q -x -p no:cacheprovider -m gpu -k "$cases")
"${run[@]}" || exit 1
filter=--kernel-regex  # its older name
compute-sanitizer --help | grep -q -e --kernel-name && filter=--kernel-name
summary="" failed=0
for tool in memcheck racecheck; do
    timeout "${LIMIT:-60}" compute-sanitizer --tool $tool $filter kns=scan_ $filter kns=conv_ --report-api-errors no --error-exitcode 9 --print-limit 5 "${run[@]}"
    code=$?
    summary+="$tool: exit code $code"$'\n'
    ((code == 0)) || failed=1
done
printf %s "$summary"
exit $failed

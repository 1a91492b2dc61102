;; Answers requests for /NAME with "hello " and what was sent. To go on in another language put the main.wasm here that a
;; compiler makes for wasm32-wasi (wasip1), and take this file away: the event's data is standard input, the answer standard output.
(module
  (import "wasi_snapshot_preview1" "fd_read" (func $read (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (data (i32.const 1024) "hello ")
  (data (i32.const 512) "greeting\n")

  ;; writes a piece of memory to a stream: 1 is the answer, 2 the log
  (func $say (param $stream i32) (param $at i32) (param $size i32)
    (i32.store (i32.const 0) (local.get $at))
    (i32.store (i32.const 4) (local.get $size))
    (drop (call $write (local.get $stream) (i32.const 0) (i32.const 1) (i32.const 8))))

  (func (export "_start")
    (call $say (i32.const 2) (i32.const 512) (i32.const 9))
    ;; up to 32 KiB of the event, right behind the greeting
    (i32.store (i32.const 0) (i32.const 1030))
    (i32.store (i32.const 4) (i32.const 32768))
    (drop (call $read (i32.const 0) (i32.const 0) (i32.const 1) (i32.const 8)))
    (call $say (i32.const 1) (i32.const 1024) (i32.add (i32.const 6) (i32.load (i32.const 8))))))

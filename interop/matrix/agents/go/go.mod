module hybridkex/interop

go 1.27

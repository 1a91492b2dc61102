from edgeward.hub.main import main

raise SystemExit(main())
